"""The paper's statements, its figures, and what follows from ours.

`steps` are the rows of `tradeoff`; `equal` those of `at_equal_learning`, or None where some start
learnt nothing, and nothing can be compared.
"""

from __future__ import annotations

import pandas as pd

from experiments.papers.verdicts import Claim, Verdict, judge

LABELS = {
    "kaiming": "LoRA",
    "corda_kpm": "CorDA kpm",
    "corda_ipm": "CorDA ipm",
    "pissa": "PiSSA",
}
NEEDED = ("kaiming", "corda_kpm", "corda_ipm")
MARGIN = 0.9


def all_claims(steps: pd.DataFrame, equal: pd.DataFrame | None, fall: float) -> list[Claim]:
    return [
        forgets_less(
            equal, fall, "kaiming",
            "In its knowledge-preserved mode CorDA forgets less than LoRA",
            "TriviaQA 44.30 against 44.17, NQ open 9.36 against 1.91 (Llama-2-7B, r = 128, after "
            "MetaMathQA)",
        ),
        forgets_less(
            equal, fall, "corda_ipm",
            "The knowledge-preserved mode keeps more than the instruction-previewed one",
            "– (the modes are not compared on what is kept)",
        ),
        learns_more(
            steps, "corda_ipm", ("corda_kpm", "kaiming"),
            "The instruction-previewed mode learns most",
            "GSM8K: ipm 53.90, kpm 44.58, LoRA 42.68 (Llama-2-7B, r = 128, one rate)",
        ),
        learns_more(
            steps, "corda_kpm", ("kaiming",),
            "The knowledge-preserved mode learns no less than LoRA",
            "GSM8K: kpm 44.58, LoRA 42.68 (Llama-2-7B, r = 128, one rate)",
        ),
    ]  # fmt: skip


def forgets_less(
    equal: pd.DataFrame | None, fall: float, other: str, statement: str, paper: str
) -> Claim:
    """Divergence of kpm and of another start where both have learnt `fall`, seed by seed."""
    criterion = (
        f"where all have learnt the same, kpm’s KL is below {MARGIN} of {LABELS[other]}’s with "
        f"every seed; same direction: below it on average; the opposite: above it by 1 / {MARGIN} "
        "with every seed"
    )
    if equal is None:
        ours = f"some start learnt nothing (best fall of its loss: {fall:.3f} nats)"
        return Claim(statement, paper, ours, criterion, Verdict.NOT_JUDGED)
    found = equal.pivot(index="seed", columns="method", values="divergence")
    kpm, against = found["corda_kpm"], found[other]
    ratios = kpm / against
    return Claim(
        statement=statement,
        paper=paper,
        ours=f"KL at {fall:.3f} nats learnt: kpm {kpm.mean():.3g}, {LABELS[other]} "
        f"{against.mean():.3g}; ratio by seed {', '.join(f'{ratio:.2f}' for ratio in ratios)}",
        criterion=criterion,
        verdict=judge(
            holds=bool((ratios < MARGIN).all()),
            direction=bool(kpm.mean() < against.mean()),
            opposite=bool((ratios > 1 / MARGIN).all()),
        ),
        remark="Both are compared at the rate, of those tried, at which each forgets least; the "
        "paper has one rate for all and compares where the training ends.",
    )


def learns_more(
    steps: pd.DataFrame, start: str, others: tuple[str, ...], statement: str, paper: str
) -> Claim:
    """Falls of the held-out loss at the last step, each at its best rate, seed by seed."""
    last = steps[steps["step"] == steps["step"].max()]
    best = last.groupby(["seed", "method"])["fall"].max().unstack("method")
    means = best.mean()
    ahead = all((best[start] > best[other]).all() for other in others)
    named = " and ".join(LABELS[other] for other in others)
    return Claim(
        statement=statement,
        paper=paper,
        ours="fall of the held-out loss, nats: "
        + ", ".join(f"{LABELS[name]} {means[name]:.3f}" for name in (start, *others)),
        criterion=f"after the same steps, each at its best rate, the held-out loss of "
        f"{LABELS[start]} has fallen more than that of {named} with every seed; same direction: on "
        "average; the opposite: less than every other’s with every seed",
        verdict=judge(
            holds=ahead,
            direction=all(means[start] > means[other] for other in others),
            opposite=all((best[start] < best[other]).all() for other in others),
        ),
    )
