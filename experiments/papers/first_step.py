"""LoRA-GA: the adapter's first step follows the gradient of the whole weight.

Full fine-tuning moves W along -G. An adapter moves s B A by a step of rank 2r at most, which
depends on its start (see `first_step_rows`). LoRA-GA starts from the gradient's singular vectors,
so that this step is the best approximation of G that its rank allows. That is an identity on the
data of G. Training goes on with other data, so the same step is also measured on batches that no
method has seen. Medians are taken for each model: models differ in the rank of their gradients, and
not every method is measured on each of them.

Source: Wang, Yu & Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024,
arXiv 2407.05000, theorem 3.1.
"""

from __future__ import annotations

import altair as alt
import pandas as pd

from .application import run
from .claim import Claim, judge
from .drawing import color, plot
from .first_step_rows import (
    CALIBRATION,
    FRESH,
    SUBJECT,
    TOGETHER,
    FirstStepOptions,
    measure,
)
from .reproduction import Figure, Measurement, Reproduction, Table, summary_table

SHARE = 0.95
NEAR_BOUND = 0.01
FAR_FROM_BOUND = 1.5
TIE = 1e-6
PLACE = ["model", "layer", "batch"]
ERROR = "relative error of the first step (1: perpendicular to the gradient)"


def judge_all(measured: Measurement) -> list[Claim]:
    """Four claims; fewer if the methods that they compare were not measured."""
    rows = measured["steps"]
    own, fresh = rows[rows["data"] == CALIBRATION], rows[rows["data"] == FRESH]
    found = [closest_claim(own), bound_claim(own), zero_claim(own), fresh_claim(fresh)]
    return [claim for claim in found if claim is not None]


def closest_claim(rows: pd.DataFrame) -> Claim:
    """LoRA-GA has the smallest error on its own data."""
    share, medians = share_closest(rows), median_errors(rows)
    nearest, beaten = order(medians)
    return Claim(
        statement="LoRA-GA’s first step is the closest of all methods to full fine-tuning’s",
        paper="theorem 3.1: no start of rank r is closer (no figure of its distance)",
        ours=f"closest in {share:.0%} of the layers; median error: {show_medians(medians)}",
        criterion=f"on the data it is calibrated on: the smallest error in at least {SHARE:.0%} of "
        "the layers; same direction: the smallest median error on every model; contradicts: "
        "another method’s median is smaller on every model",
        verdict=judge(holds=share >= SHARE, direction=nearest, opposite=beaten),
    )


def bound_claim(rows: pd.DataFrame) -> Claim:
    """The step of LoRA-GA attains the bound of its rank."""
    own = rows[rows["method"] == SUBJECT]
    # The absolute margin is for gradients of rank 2r or less, whose bound is zero.
    share = float((own["error"] <= (1 + NEAR_BOUND) * own["bound"] + 1e-3).mean())
    ratio = float((own["error"] / own["bound"].clip(lower=1e-3)).median())
    return Claim(
        statement="LoRA-GA’s first step is as close as any step of rank 2r can be: it is the "
        "gradient’s best approximation of that rank",
        paper="theorem 3.1, an identity",
        ours=f"within 1 % of the bound in {share:.0%} of the layers; its error is {ratio:.4f} of "
        "the bound (median)",
        criterion=f"within 1 % of the Eckart–Young bound in at least {SHARE:.0%} of the layers; "
        "same direction: in half of them; contradicts: the median error is more than "
        f"{FAR_FROM_BOUND} times the bound",
        verdict=judge(
            holds=share >= SHARE, direction=share >= 0.5, opposite=ratio > FAR_FROM_BOUND
        ),
    )


def zero_claim(rows: pd.DataFrame) -> Claim | None:
    """Starts with B = 0 move B alone: their step has rank r and lies in the rows of A."""
    zero = sorted(rows.loc[rows["zero_B"].astype(bool), "method"].unique())
    if not zero:
        return None
    errors = rows.pivot_table(index=PLACE, columns="method", values="error")
    shares = pd.Series(
        {name: (errors[name] > errors[SUBJECT])[errors[name].notna()].mean() for name in zero}
    )
    medians = median_errors(rows)[[SUBJECT, *zero]]
    nearest, beaten = order(medians)
    return Claim(
        statement="Starts with B = 0 follow the gradient less closely than LoRA-GA’s",
        paper="theorem 3.1: their step has rank r, its bound 2r (no figure)",
        ours=f"LoRA-GA is closer than {', '.join(zero)} in at least {shares.min():.0%} of the "
        f"layers (the fewest with {shares.idxmin()}); median error: "
        f"{show_medians(medians)}",
        criterion="on the calibration data each of them has a larger error than LoRA-GA in at "
        f"least {SHARE:.0%} of the layers; same direction: a larger median error on every model; "
        "contradicts: one of them has a smaller median on every model",
        verdict=judge(holds=bool((shares >= SHARE).all()), direction=nearest, opposite=beaten),
    )


def fresh_claim(rows: pd.DataFrame) -> Claim | None:
    """The order on new batches, among methods that keep the pretrained function."""
    away = rows["moved"].astype(bool)
    kept = rows[~away]
    if set(kept["method"]) == {SUBJECT}:
        return None
    share, medians = share_closest(kept), median_errors(kept)
    nearest, beaten = order(medians)
    left_out = ", ".join(sorted(rows.loc[away, "method"].unique()))
    return Claim(
        statement="LoRA-GA’s first step is the closest on batches that no method has seen, too",
        paper="not measured there",
        ours=f"closest in {share:.0%} of all pairs of layer and batch; median error: "
        f"{show_medians(medians)}",
        criterion="on other films, among methods that start from the pretrained function: the "
        f"smallest error in at least {SHARE:.0%} of all pairs of layer and batch; same direction: "
        "the smallest median error on every model; contradicts: another method’s median is "
        "smaller on every model",
        verdict=judge(holds=share >= SHARE, direction=nearest, opposite=beaten),
        remark=f"Left out, as their starts change the model’s function: {left_out}."
        if left_out
        else "",
        published=False,
    )


def share_closest(rows: pd.DataFrame) -> float:
    """The share of layers and batches where no other method has a smaller error; ties count."""
    errors = rows.pivot_table(index=PLACE, columns="method", values="error")
    others = errors.drop(columns=SUBJECT).min(axis=1)
    return float((errors[SUBJECT] <= others + TIE).mean())


def median_errors(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians by model (rows) and method (columns); NaN where a method was not measured."""
    return rows.pivot_table(
        index="model", columns="method", values="error", aggfunc="median", sort=False
    )


def order(medians: pd.DataFrame) -> tuple[bool, bool]:
    """Whether LoRA-GA's median is the smallest on every model, and whether on none."""
    first = medians[SUBJECT] <= medians.drop(columns=SUBJECT).min(axis=1)
    return bool(first.all()), not first.any()


def show_medians(medians: pd.DataFrame) -> str:
    """`MiniLM 0.33, the best other eva 0.78; …`, with LoRA-GA first."""
    parts = []
    for model, found in medians.iterrows():
        others = found.drop(SUBJECT)
        parts.append(
            f"{model} {found[SUBJECT]:.2f}, the best other {others.idxmin()} {others.min():.2f}"
        )
    return "; ".join(parts)


def tabulate(measured: Measurement) -> list[Table]:
    """Medians by method, and by calibration size."""
    return [
        summary_table(
            measured["steps"],
            ["model", "data", "method"],
            ["error", "bound", "bound_r"],
            "methods",
            "Relative error of the first step, median over layers",
            "error: of SGD’s step; bound: of any step of rank 2r; bound_r: of rank r. "
            "Methods that change the model’s function at step 0 are compared with their own "
            "gradient.",
            how="median",
        ),
        summary_table(
            measured["sizes"],
            ["model", "size", "data"],
            ["error"],
            "sizes",
            "LoRA-GA’s relative error by the number of sequences it is calibrated on, median",
            f"{TOGETHER}: the mean gradient of all fresh batches.",
            how="median",
        ),
    ]


def draw(measured: Measurement) -> list[Figure]:
    """The errors of all methods, and LoRA-GA's by calibration size."""
    rows, sizes = measured["steps"], measured["sizes"]
    middle = rows.groupby(["model", "method", "data"], as_index=False)["error"].median()
    middle = middle.sort_values("error")
    by_size = sizes.groupby(["model", "size", "data"], as_index=False)["error"].median()
    return [
        Figure(
            "methods",
            "How far the first step is from the gradient’s",
            "Median over layers, on the data that methods are calibrated on and on other films.",
            plot(
                middle,
                "point",
                alt.X("error:Q", title=ERROR, scale=alt.Scale(domain=[0, 1])),
                alt.Y("method:N", sort=middle["method"].unique().tolist(), title=None),
                color=color("data", [CALIBRATION, FRESH]),
                panel="model",
                height=alt.Step(16),
            ),
            width=None,
        ),
        Figure(
            "sizes",
            "LoRA-GA calibrated on more and on less",
            "Median over layers.",
            plot(
                by_size,
                "line",
                alt.X("size:Q", title="sequences", scale=alt.Scale(type="log", base=2)),
                alt.Y("error:Q", title=ERROR),
                color=color("data", [CALIBRATION, FRESH, TOGETHER]),
                panel="model",
            ),
            width=None,
        ),
    ]


REPRODUCTION = Reproduction(
    name="first_step",
    title="LoRA-GA: the first step",
    source="Wang, Yu & Li 2024, arXiv 2407.05000, theorem 3.1",
    question="Is LoRA-GA’s first step the closest to full fine-tuning’s, and does that hold on "
    "batches it was not calibrated on?",
    options=FirstStepOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
)

if __name__ == "__main__":
    run(REPRODUCTION)
