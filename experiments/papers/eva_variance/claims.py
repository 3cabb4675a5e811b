"""What the rows say of the paper's claims."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from experiments.papers.eva_variance.inputs import OTHER_DATA, THE_END
from experiments.papers.starts import UNCENTRED
from experiments.papers.verdicts import Claim, judge

SHARE = 0.95
MOST, TIMES_RANDOM = 0.5, 5
CONVERGED = 0.95
RANDOM = ("kaiming", "gaussian", "orthogonal")
EVAS = ("eva", UNCENTRED)
TIE = 1e-6


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
        "direction: at least twice as much in every input",
        verdict=judge(
            holds=bool((middle >= MOST).all()) and times.median() >= TIMES_RANDOM,
            direction=bool((times >= 2).all()),
            opposite=times.median() < 1,
        ),
    )


def converges(convergence: pd.DataFrame) -> Claim:
    """Whether other data would have given the same subspace, and how much it matters."""
    others = convergence[convergence["against"] == OTHER_DATA]
    middle = others.groupby(["model", "batches"])[["overlap", "kept"]].median()
    last = middle.groupby("model").tail(1)
    quarter = {
        model: some.xs(model).loc[lambda frame: frame.index >= frame.index.max() / 4].iloc[0]
        for model, some in middle.groupby("model")
    }
    start = middle.groupby("model").head(1)
    overlaps = last["overlap"].droplevel("batches")
    kept = pd.Series({model: row["kept"] for model, row in quarter.items()})
    own = convergence[convergence["against"] == THE_END]
    return Claim(
        statement="They are found in few batches",
        paper="about 90 batches of 4 (components stop turning)",
        ours=f"after {counts(last)} batches of 4 the subspace overlaps that of other films by "
        f"{listed(overlaps, '.2f')}; a quarter of the batches finds {listed(kept, '.1%')} of the "
        "variance that other films’ own subspace explains there",
        criterion=f"median overlap with the subspace of equally many batches of other films is "
        f"{CONVERGED} or more, and a quarter of the batches keeps 99 % of the variance; same "
        "direction: the overlap rises with every doubling",
        verdict=judge(
            holds=bool((overlaps >= CONVERGED).all()) and bool((kept >= 0.99).all()),
            direction=rises(own) and rises(others)
            and bool((last["overlap"].values > start["overlap"].values).all()),
        ),
    )  # fmt: skip


def rises(convergence: pd.DataFrame) -> bool:
    """Whether the median overlap falls nowhere by more than a hundredth."""
    middle = convergence.groupby(["model", "batches"])["overlap"].median()
    steps = middle.groupby("model").diff().dropna()
    return bool((steps > -0.01).all())


def counts(last: pd.DataFrame) -> str:
    return " and ".join(str(count) for count in last.index.get_level_values("batches").unique())


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
        "more; same direction: in half of them. ‖A‖² alone makes it three times as large",
        verdict=judge(holds=share >= SHARE, direction=share > 0.5, opposite=share < 0.5),
    )


def largest_of_all(gradients: pd.DataFrame) -> Claim:
    """At equal norm of A, which is what the theorem compares."""
    equal = pivoted(gradients, "equal_norm")
    others = equal.drop(columns=[name for name in EVAS if name in equal])
    eva = equal[[name for name in EVAS if name in equal]].max(axis=1)
    share = float((eva >= others.max(axis=1) - TIE).mean())
    medians = equal.median().sort_values(ascending=False)
    best = others.median().idxmax()
    own = eva.median()
    random = [name for name in RANDOM if name in equal]
    above = bool((equal["eva"] > equal[random].max(axis=1)).mean() >= SHARE)
    ceiling = gradients.groupby(["model", "layer"])["ceiling"].first().median()
    return Claim(
        statement="No other A of its norm gives B a larger first gradient than EVA’s",
        paper="theorem 3.2: the maximum over A with orthonormal rows, if the gradients of tokens "
        "are independent of the inputs",
        ours=f"EVA (centred or not) is the largest in {share:.0%} of the layers; median share of "
        f"the gradient’s energy {own:.2f}, {best} {medians[best]:.2f}, the most possible "
        f"{ceiling:.2f}",
        criterion=f"at equal ‖A‖, among all methods: the largest in {SHARE:.0%} of the layers or "
        f"more; same direction: larger than every random A in {SHARE:.0%} of them",
        verdict=judge(
            holds=share >= SHARE,
            direction=above,
            opposite=bool((equal["eva"] < equal["kaiming"]).mean() > 0.5),
        ),
    )


def pivoted(gradients: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row a layer of any model, a column a method that every model has."""
    found = gradients.pivot_table(index=["model", "layer"], columns="method", values=column)
    return found.dropna(axis=1)


def fewer_parameters(ranks: pd.DataFrame, rho: float) -> Claim:
    total = ranks.groupby("model")[["parameters", "uniform"]].sum()
    change = total["parameters"] / total["uniform"] - 1
    return Claim(
        statement="Redistributed ranks need fewer trainable parameters",
        paper="fewer at the same sum of ranks (abstract; no figure noted)",
        ours=f"rho = {rho:g}: {listed(change, '+.1%')} parameters beside equal ranks",
        criterion="at least 1 % fewer in every model; same direction: fewer in every model",
        verdict=judge(
            holds=bool((change <= -0.01).all()),
            direction=bool((change < 0).all()),
            opposite=bool((change > 0).all()),
        ),
    )


def cheap(costs: Sequence[dict]) -> Claim:
    seconds = {row["method"]: row["seconds"] for row in costs}
    shares = {row["method"]: row["share"] for row in costs}
    cheaper = [seconds["eva"] < seconds[name] for name in ("lora_ga", "corda")]
    told = ", ".join(
        f"{name} {shares[name]:.2g}" for name in ("olora", "pissa", "lora_ga", "corda")
    )
    return Claim(
        statement="It costs a small part of the training, less than LoRA-GA’s and CorDA’s starts",
        paper="0.7 % of the training time at batch 16; OLoRA 0.1, PiSSA 1.5, LoRA-GA 2.4, CorDA "
        "4.5",
        ours=f"{shares['eva']:.2g} % of one epoch; {told}",
        criterion="below 1 % of an epoch, and fewer seconds than LoRA-GA and CorDA on the same "
        "sequences; same direction: fewer seconds than both",
        verdict=judge(
            holds=all(cheaper) and shares["eva"] < 1,
            direction=all(cheaper),
            opposite=not any(cheaper),
        ),
    )


def listed(values: pd.Series, form: str) -> str:
    """One figure a model; the name where there are several."""
    if len(values) == 1:
        return format(values.iloc[0], form)
    return ", ".join(f"{value:{form}} ({model})" for model, value in values.items())
