"""The paper's statements, its figures, and what follows from ours.

`steps` are the rows of `tradeoff`; `equal` those of `at_equal_learning` by the share of the common
fall where they were read, none where some start learned nothing and nothing can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from .claim import Claim, Verdict, judge
from .corda_knowledge_tradeoff import LABELS, at_the_end, grid_edge
from .interval import Interval, mean

MARGIN = 0.9
NO_LESS = 0.02

Equal = Mapping[float, pd.DataFrame]


def all_claims(steps: pd.DataFrame, equal: Equal, fall: float) -> list[Claim]:
    return [
        keeps_more(
            steps, equal, fall, "divergence", "kaiming",
            "In its knowledge-preserved mode CorDA changes what is known less than LoRA",
            "after MetaMathQA: TriviaQA 44.30 against 44.17, NQ open 9.36 against 1.91 "
            "(Llama-2-7B, r = 128)",
        ),
        keeps_more(
            steps, equal, fall, "perplexity", "kaiming",
            "After its knowledge-preserved mode CorDA is better than LoRA at what was known",
            "TriviaQA 44.30 against 44.17, NQ open 9.36 against 1.91 (Llama-2-7B, r = 128): a "
            "score, not a distance",
        ),
        keeps_more(
            steps, equal, fall, "divergence", "corda_ipm",
            "CorDA’s knowledge-preserved mode changes what is known less than its "
            "instruction-previewed one",
            "– (the modes are not compared on what is kept)",
            published=False,
        ),
        learns_more(
            steps, "corda_ipm", ("corda_kpm", "kaiming"),
            "CorDA’s instruction-previewed mode learns more than its knowledge-preserved one and "
            "LoRA",
            "GSM8K: ipm 53.90, kpm 44.58, LoRA 42.68 (Llama-2-7B, r = 128, one rate)",
        ),
        learns_more(
            steps, "corda_kpm", ("kaiming",),
            "CorDA’s knowledge-preserved mode learns no less than LoRA",
            "GSM8K: kpm 44.58, LoRA 42.68 (Llama-2-7B, r = 128, one rate)",
            slack=NO_LESS,
        ),
    ]  # fmt: skip


def keeps_more(
    steps: pd.DataFrame,
    equal: Equal,
    fall: float,
    measure: str,
    other: str,
    statement: str,
    paper: str,
    *,
    published: bool = True,
) -> Claim:
    """kpm against another start where both have learned the same: seed by seed, and over blocks.

    Args:
        measure: "divergence", or "perplexity", for which no margin is asked.
    """
    margin, name = (MARGIN, "KL") if measure == "divergence" else (1.0, "perplexity on plots")
    below = f"below {margin:g} of {LABELS[other]}’s" if margin < 1 else f"below {LABELS[other]}’s"
    criterion = (
        f"where half of the common fall is learned and where all of it is, kpm’s {name} is {below} "
        "with every seed, and the mean difference over blocks of text is below 0 beyond its 95 % "
        "interval; same direction: below it on average at both; contradicts: above it"
        + (f" by 1 / {margin:g}" if margin < 1 else "")
        + " with every seed at both, beyond the interval; not judged where both are best at an "
        "edge of their rates"
    )
    if not equal:
        ours = f"some start learned nothing (best fall of its loss: {fall:.3f} nats)"
        return Claim(
            statement, paper, ours, criterion, Verdict.NOT_JUDGED, published=published
        )  # fmt: skip
    tables = {
        share: found.pivot(index="seed", columns="method", values=measure)
        for share, found in equal.items()
    }
    ratios = pd.concat([found["corda_kpm"] / found[other] for found in tables.values()])
    middle = {share: found.mean() for share, found in tables.items()}
    differences = [over_blocks(found, measure, other) for found in equal.values()]
    edges, both = [], False
    for share, found in equal.items():
        rates = found.groupby("method")["rate"].apply(list)
        here = [at_edge(steps, method, rates[method]) for method in ("corda_kpm", other)]
        both = both or all(here)
        edges += [f"{told} at {share * fall:.2f} nats" for told in here if told]
    verdict = judge(
        holds=bool((ratios < margin).all()) and all(d.below_zero for d in differences),
        direction=all(found["corda_kpm"] < found[other] for found in middle.values()),
        opposite=bool((ratios > 1 / margin).all()) and all(d.above_zero for d in differences),
    )
    unit = "KL" if measure == "divergence" else "loss, nats a token,"
    return Claim(
        statement=statement,
        paper=paper,
        ours="; ".join(
            f"{name} at {share * fall:.2f} nats learned: kpm {found['corda_kpm']:.3g}, "
            f"{LABELS[other]} {found[other]:.3g} (difference of the {unit} "
            f"{difference.show('+.3g')})"
            for (share, found), difference in zip(middle.items(), differences, strict=True)
        ),
        criterion=criterion,
        verdict=Verdict.NOT_JUDGED if both else verdict,
        remark=edge_remark(edges),
        published=published,
    )


def over_blocks(found: pd.DataFrame, measure: str, other: str) -> Interval:
    """kpm minus another, a mean over seeds, paired by block: of KL or of the loss, nats a token."""
    column = "divergences" if measure == "divergence" else "losses"
    blocks = {method: np.mean(list(some[column]), 0) for method, some in found.groupby("method")}
    return mean(blocks["corda_kpm"] - blocks[other])


def learns_more(
    steps: pd.DataFrame,
    start: str,
    others: tuple[str, ...],
    statement: str,
    paper: str,
    *,
    slack: float = 0.0,
) -> Claim:
    """Falls of the held-out loss at the last step, each at its best rate, seed by seed.

    Args:
        slack: nats by which `start` may stay behind.
    """
    best = at_the_end(steps)
    falls = best.pivot(index="seed", columns="method", values="fall")
    falls = falls.reindex(columns=[start, *others])
    named = " and ".join(LABELS[other] for other in others)
    more = (
        f"no more than {slack:g} nats less than" if slack else "more than"
    )  # fmt: skip
    criterion = (
        f"after the same steps, each at its best rate, the held-out loss of {LABELS[start]} has "
        f"fallen {more} that of {named} with every seed; same direction: on average; contradicts: "
        + (f"by more than {slack:g} nats less" if slack else "less")
        + f" than that of {'each of them' if len(others) > 1 else named} with every seed; not "
        "judged where both of two that are compared are best at an edge of their rates"
    )
    if falls.isna().any(axis=None):
        lost = ", ".join(LABELS[name] for name in falls if falls[name].isna().any())
        ours = f"no training of {lost} came to its end with every seed"
        return Claim(statement, paper, ours, criterion, Verdict.NOT_JUDGED)
    rates = best.groupby("method")["rate"].apply(list)
    edges = {name: at_edge(steps, name, rates[name]) for name in (start, *others)}
    middle = falls.mean()
    gaps = [falls[start] - falls[other] + slack for other in others]
    verdict = judge(
        holds=all((gap > 0).all() for gap in gaps),
        direction=all(gap.mean() > 0 for gap in gaps),
        opposite=all((gap < 0).all() for gap in gaps),
    )
    undecided = bool(edges[start]) and any(edges[other] for other in others)
    return Claim(
        statement=statement,
        paper=paper,
        ours="fall of the held-out loss, nats: "
        + ", ".join(f"{LABELS[name]} {middle[name]:.3f}" for name in (start, *others)),
        criterion=criterion,
        verdict=Verdict.NOT_JUDGED if undecided else verdict,
        remark=edge_remark([told for told in edges.values() if told]),
    )


def at_edge(steps: pd.DataFrame, method: str, rates: Sequence[float]) -> str:
    """A method whose best rate with some seed is an edge of what it tried; else nothing."""
    edge = grid_edge(steps, method, rates)
    return f"{LABELS[method]} is best at the {edge} of its rates" if edge else ""


def edge_remark(edges: Sequence[str]) -> str:
    if not edges:
        return ""
    return f"{'; '.join(edges)}: beyond it may lie a better one."
