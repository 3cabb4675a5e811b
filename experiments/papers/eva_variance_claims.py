"""The claims about EVA."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .claim import Claim, Verdict, judge
from .eva_variance_inputs import OTHER_DATA
from .eva_variance_rows import EVAS, FULL_SVD
from .starts import UNCENTRED

SHARE = 0.95
MOST, TIMES_RANDOM = 0.5, 5
TAU, PAPER_BATCHES, PAPER_SIZE = 0.99, 90, 4
ALIKE, ENOUGH, FALL = 0.95, 0.99, 0.01
RANDOM = ("kaiming", "gaussian", "orthogonal")
TIE = 1e-6
COSTS = {"olora": "OLoRA", "eva": "EVA", FULL_SVD: "PiSSA", "lora_ga": "LoRA-GA", "corda": "CorDA"}
"""The paper's starts, the cheapest first; PiSSA is a full decomposition of every weight."""


def explains(explained: pd.DataFrame, rank: int) -> Claim:
    """Of inputs that EVA has not seen."""
    some = explained[explained["rank"] == rank]
    shares = some.pivot_table(index=["model", "layer"], columns="method", values="fresh")
    random = shares[[name for name in shares if name in RANDOM]].max(axis=1)
    times = shares["eva"] / random
    middle = shares.groupby("model")["eva"].median()
    return Claim(
        statement="The first directions of a layer’s inputs explain most of their variance",
        paper="most of it, in few components (curves; no figure noted)",
        ours=f"r = {rank}, on other films: {listed(middle, '.0%')} (median over inputs), "
        f"{times.median():.0f} times what a random A explains",
        criterion=f"the median over a model’s inputs is {MOST:.0%} or more, and EVA explains "
        f"{TIMES_RANDOM} times what kaiming and gaussian do or more, in the median; same "
        "direction: at least twice as much in every input; contradicts: less than they do in the "
        "median",
        verdict=judge(
            holds=bool((middle >= MOST).all()) and times.median() >= TIMES_RANDOM,
            direction=bool((times >= 2).all()),
            opposite=times.median() < 1,
        ),
    )


def converges(turning: pd.DataFrame) -> Claim:
    """After how many batches one more turns no component, as EVA's own early stop asks."""
    middle = turning.groupby(["model", "batches"])["cosine"].median()
    sizes = turning.groupby("model")["size"].first()
    found = {model: some.droplevel("model") for model, some in middle.groupby("model")}
    enough = PAPER_BATCHES * PAPER_SIZE
    long = [model for model in found if found[model].index.max() * sizes[model] >= enough]
    criterion = (
        f"the least cosine of a component with the one of a batch before, median over inputs, is "
        f"{TAU} or more from some number of batches on, by {PAPER_BATCHES} batches of {PAPER_SIZE} "
        "sequences, with every model that is given as many; same direction: it is larger after "
        "the last batch than after the second; contradicts: smaller with every such model; not "
        "judged where none is given as many"
    )
    stops = {model: stopped(found[model]) for model in found}
    held = [
        stops[model] is not None and stops[model] * sizes[model] <= enough for model in long
    ]  # fmt: skip
    rises = [found[model].iloc[-1] - found[model].iloc[0] for model in long]
    verdict = judge(
        holds=all(held),
        direction=all(rise > 0 for rise in rises),
        opposite=all(rise < 0 for rise in rises),
    )
    short = [model for model in found if model not in long]
    return Claim(
        statement="They are found in few batches: components stop turning",
        paper=f"about {PAPER_BATCHES} batches of {PAPER_SIZE}",
        ours="; ".join(
            f"{model}: "
            + ("at none" if stops[model] is None else f"from {stops[model]} batches on")
            + f" of {some.index.max()} batches of {sizes[model]} sequences, cosine at the last "
            f"{some.iloc[-1]:.3f}"
            for model, some in found.items()
        ),
        criterion=criterion,
        verdict=verdict if long else Verdict.NOT_JUDGED,
        remark=f"Fewer batches than the paper’s were given to {' and '.join(short)}, which is not "
        "judged."
        if short
        else "",
    )


def stopped(cosines: pd.Series) -> int | None:
    """The number of batches from which on the cosine is TAU or more; None where it is not yet."""
    turned = cosines.index[cosines < TAU]
    still = cosines.index[cosines.index > turned.max()] if len(turned) else cosines.index
    return int(still[0]) if len(still) else None


def same_elsewhere(convergence: pd.DataFrame) -> Claim:
    """Whether other data would have given the same subspace, and how much it matters."""
    others = convergence[convergence["against"] == OTHER_DATA]
    middle = others.groupby(["model", "batches"])[["overlap", "kept"]].median()
    models = {model: some.droplevel("model") for model, some in middle.groupby("model")}
    early = {model: quarter(some.index.tolist()) for model, some in models.items()}
    overlaps = pd.Series({model: some["overlap"].iloc[-1] for model, some in models.items()})
    kept = pd.Series({model: some.loc[early[model], "kept"] for model, some in models.items()})
    rises = [some["overlap"].iloc[-1] - some["overlap"].iloc[0] for some in models.values()]
    falls = [float(some["overlap"].diff().min()) for some in models.values()]
    return Claim(
        statement="Other data give the same directions, and few batches of them do",
        paper="– (it follows one pass over one data set)",
        ours="; ".join(
            f"{model}: after {some.index[-1]} batches the subspace overlaps that of as many of "
            f"other films by {overlaps[model]:.2f}, and {early[model]} of them keep "
            f"{kept[model]:.1%} of the variance that this one explains there"
            for model, some in models.items()
        ),
        criterion=f"median overlap with the subspace of equally many batches of other films is "
        f"{ALIKE} or more, and the last number of batches measured that is at most a quarter of "
        f"them keeps {ENOUGH:.0%} of the variance; same direction: the overlap with that subspace "
        f"is larger after all batches than after one and falls from none measured to the next by "
        f"more than {FALL:g}; contradicts: smaller after all than after one, with every model",
        verdict=judge(
            holds=bool((overlaps >= ALIKE).all()) and bool((kept >= ENOUGH).all()),
            direction=all(rise > 0 for rise in rises) and all(fall >= -FALL for fall in falls),
            opposite=all(rise < 0 for rise in rises),
        ),
        published=False,
    )


def quarter(counts: Sequence[int]) -> int:
    """The largest of ascending counts that is at most a quarter of the last; else the first."""
    return max((count for count in counts if 4 * count <= counts[-1]), default=counts[0])


def larger_than_random(gradients: pd.DataFrame) -> Claim:
    """As they come: what a user of the library's defaults gets at one scaling."""
    raw = pivoted(gradients, "raw")
    ratio = raw["eva"] / raw["kaiming"]
    share = float((ratio > 1).mean())
    return Claim(
        statement="EVA’s first gradient of B is larger than that of LoRA’s random A",
        paper="theorem 3.2, for an A with orthonormal rows (no figure)",
        ours=f"E‖∇B‖² is {ratio.median():.0f} times kaiming’s in the median layer, larger in "
        f"{share:.0%} of the layers",
        criterion=f"at equal scaling, each A as it comes: larger in {SHARE:.0%} of the layers or "
        "more; same direction: in more than half of them; contradicts: in fewer. ‖A‖² alone makes "
        "it three times as large",
        verdict=judge(holds=share >= SHARE, direction=share > 0.5, opposite=share < 0.5),
    )


def largest_of_all(gradients: pd.DataFrame) -> Claim:
    """With the rows of each A made orthonormal, which is what the theorem compares."""
    still = gradients[~gradients["moved"]]
    span = pivoted(still, "span")
    others = span.drop(columns=[name for name in EVAS if name in span])
    own = span[UNCENTRED]
    share = float((own >= others.max(axis=1) - TIE).mean())
    random = [name for name in RANDOM if name in span]
    above = bool((own > span[random].max(axis=1)).mean() >= SHARE)
    moved = gradients.loc[gradients["moved"], "method"].drop_duplicates().tolist()
    told = []
    for model, some in span.groupby("model"):
        medians = some[others.columns].median()
        there = still[still["model"] == model]
        ceiling = there.groupby("layer")["ceiling"].first().median()
        told.append(
            f"{model}: EVA {some[UNCENTRED].median():.2f}, {medians.idxmax()} "
            f"{medians.max():.2f}, the most possible {ceiling:.2f}"
        )
    return Claim(
        statement="Among A with orthonormal rows none gives B a larger first gradient than EVA’s",
        paper="theorem 3.2: the maximum, if the gradients of tokens are independent of the inputs, "
        "which are not centred (no figure)",
        ours=f"EVA, not centred, is the largest in {share:.0%} of the layers; median share of the "
        f"gradient’s energy: {'; '.join(told)}",
        criterion="the share of the gradient’s energy in the row space of each A, among all starts "
        f"that keep the model’s function: EVA’s, not centred, is the largest in {SHARE:.0%} of "
        f"the layers or more; same direction: larger than every random A’s in {SHARE:.0%} of them; "
        "contradicts: smaller than kaiming’s in more than half",
        verdict=judge(
            holds=share >= SHARE,
            direction=above,
            opposite=bool((own < span["kaiming"]).mean() > 0.5),
        ),
        remark=f"Left out, as their starts change the model and with it the gradient: "
        f"{', '.join(moved)}."
        if moved
        else "",
    )


def pivoted(gradients: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row a layer of any model, a column a method; nothing where one was not measured."""
    return gradients.pivot_table(index=["model", "layer"], columns="method", values=column)


def fewer_parameters(ranks: pd.DataFrame, rho: float) -> Claim:
    total = ranks.groupby("model")[["parameters", "uniform"]].sum()
    change = total["parameters"] / total["uniform"] - 1
    return Claim(
        statement="Redistributed ranks need fewer trainable parameters",
        paper="fewer at the same sum of ranks (abstract; no figure noted)",
        ours=f"rho = {rho:g}: {listed(change, '+.1%')} parameters beside equal ranks",
        criterion="at least 1 % fewer in every model; same direction: fewer in every model; "
        "contradicts: more in every model",
        verdict=judge(
            holds=bool((change <= -0.01).all()),
            direction=bool((change < 0).all()),
            opposite=bool((change > 0).all()),
        ),
    )


def cheap(costs: Sequence[dict]) -> Claim:
    """The order of what starts cost: their share of a training is the length of the training."""
    seconds = {row["method"]: row["seconds"] for row in costs}
    found = [seconds[name] for name in COSTS]
    cheaper = [seconds["eva"] < seconds[name] for name in ("lora_ga", "corda")]
    order = sorted(COSTS, key=lambda name: seconds[name])
    return Claim(
        statement="OLoRA’s start costs least, then EVA’s, then PiSSA’s, LoRA-GA’s and CorDA’s",
        paper="percent of the training time at batch 16: OLoRA 0.1, EVA 0.7, PiSSA 1.5, LoRA-GA "
        "2.4, CorDA 4.5",
        ours="seconds: " + ", ".join(f"{COSTS[name]} {seconds[name]:.2g}" for name in order),
        criterion="seconds on the same sequences rise in this order, PiSSA by a full decomposition "
        "of every weight; same direction: EVA takes fewer than LoRA-GA and CorDA; contradicts: "
        "more than either of them",
        verdict=judge(
            holds=found == sorted(found),
            direction=all(cheaper),
            opposite=not any(cheaper),
        ),
        timed=True,
    )


def listed(values: pd.Series, form: str) -> str:
    """One figure a model; the name where there are several."""
    if len(values) == 1:
        return format(values.iloc[0], form)
    return ", ".join(f"{value:{form}} ({model})" for model, value in values.items())
