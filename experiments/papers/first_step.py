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
from .drawing import INK, chart, color, legend, tips
from .first_step_rows import (
    CALIBRATION,
    FRESH,
    OWN_START,
    SUBJECT,
    TOGETHER,
    FirstStepOptions,
    measure,
)
from .reproduction import Figure, Measurement, Reproduction, Table
from .subject import file_name

SHARE = 0.95
NEAR_BOUND = 0.01
FAR_FROM_BOUND = 1.5
TIE = 1e-6
PLACE = ["model", "layer", "batch"]
NAMES = {CALIBRATION: "its own data", FRESH: "other films", TOGETHER: "mean of other films"}
ERROR = ["relative error of the first step", "0: along the gradient, 1: perpendicular to it"]
BOUNDS = {"best of rank 2r": "bound", "best of rank r": "bound_r"}


def judge_all(measured: Measurement) -> list[Claim]:
    """Four claims; fewer if the methods that they compare were not measured."""
    rows = measured["steps"]
    rows = rows[rows["method"] != OWN_START]
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
    where = (
        "every layer"
        if shares.min() == 1
        else f"at least {shares.min():.0%} of the layers (the fewest beside {shares.idxmin()})"
    )
    return Claim(
        statement="Starts with B = 0 follow the gradient less closely than LoRA-GA’s",
        paper="theorem 3.1: their step has rank r, its bound 2r (no figure)",
        ours=f"LoRA-GA is closer than {', '.join(zero)} in {where}; median error: "
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
    remarks = [
        closer_methods(kept, share),
        moved_methods(rows, sorted(rows.loc[away, "method"].unique())),
    ]
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
        remark=" ".join(remark for remark in remarks if remark),
        published=False,
    )


def closer_methods(rows: pd.DataFrame, share: float) -> str:
    """The methods that are closer where LoRA-GA is not."""
    if share == 1:
        return ""
    best = rows.pivot_table(index=PLACE, columns="method", values="error").idxmin(axis=1)
    who = best[best != SUBJECT].value_counts(normalize=True).head(3)
    names = ", ".join(f"{name} ({part:.0%})" for name, part in who.items())
    return f"Where another is closer it is {names}."


def moved_methods(rows: pd.DataFrame, methods: list[str]) -> str:
    """The methods that were left out and are closer to their own gradient."""
    errors = rows.pivot_table(index=PLACE, columns="method", values="error")
    closer = {name: (errors[name] < errors[SUBJECT])[errors[name].notna()] for name in methods}
    found = []
    for name, where in closer.items():
        if where.any():
            pairs = errors.loc[where.index, [name, SUBJECT]].groupby("model").median()
            medians = "; ".join(
                f"{model} {pair[name]:.2f} beside LoRA-GA’s {pair[SUBJECT]:.2f}"
                for model, pair in pairs.iterrows()
            )
            found.append(f"{name} is closer in {where.mean():.0%} (median error: {medians})")
    if not found:
        return ""
    return (
        "Left out are methods that change the model’s function first and are held against the "
        f"gradient there; of these {', '.join(found)}."
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
    """Medians by method and by calibration size."""
    return [methods_table(measured["steps"]), sizes_table(measured["sizes"])]


def methods_table(rows: pd.DataFrame) -> Table:
    columns = {
        "SGD, own data": (CALIBRATION, "error"),
        "SGD, other films": (FRESH, "error"),
        "Adam, other films": (FRESH, "adam"),
        "Adam beside sign(G)": (FRESH, "adam_signs"),
    }
    parts = []
    for model, some in rows.groupby("model", sort=False):
        medians = some.groupby(["data", "method"])[["error", "adam", "adam_signs"]].median()
        found = pd.DataFrame({name: medians.loc[data, c] for name, (data, c) in columns.items()})
        found = found.sort_values("SGD, own data")
        base = some[some["method"] == SUBJECT].groupby("data")
        for name, column in BOUNDS.items():
            best = base[column].median()
            found.loc[name, list(columns)[:2]] = [best[CALIBRATION], best[FRESH]]
        found.insert(0, "model", model)
        parts.append(found.rename_axis("method").reset_index())
    frame = pd.concat(parts, ignore_index=True)
    return Table(
        "methods",
        "Relative error of the first step, median over layers",
        frame[["model", "method", *columns]],
        dict.fromkeys(columns, ".3f"),
        "Columns 3 and 4: SGD’s step beside G. Columns 5 and 6: Adam’s first step beside G, and "
        "beside sign(G), the first step of full fine-tuning by Adam. Methods that change the "
        "model’s function at step 0 are held against their own gradient.",
    )


def sizes_table(sizes: pd.DataFrame) -> Table:
    frame = sizes.pivot_table(
        index=["model", "size"], columns="data", values="error", aggfunc="median"
    )[[CALIBRATION, FRESH, TOGETHER]]
    frame.columns = ["own data", "other films, a batch", "their mean"]
    return Table(
        "sizes",
        "LoRA-GA’s relative error by the number of sequences it is calibrated on, median",
        frame.reset_index().rename(columns={"size": "sequences"}),
        dict.fromkeys(frame.columns, ".3f"),
        "Their mean: the mean gradient of all fresh batches in the place of one batch’s.",
    )


def draw(measured: Measurement) -> list[Figure]:
    """The errors of all methods on each model, and LoRA-GA's by calibration size."""
    dots = [
        Figure(
            f"methods_{file_name(model)}",
            f"How far the first step is from the gradient’s ({model})",
            "A dot a layer (and fresh batch), a bar at the median. Blue: on the data that methods "
            "are calibrated on; orange: on other films. Below, what no step of that rank can "
            "beat.",
            methods_chart(rows),
        )
        for model, rows in measured["steps"].groupby("model", sort=False)
    ]
    sizes = Figure(
        "sizes",
        "LoRA-GA calibrated on more and on less",
        "Median over layers: on its own data, on a fresh batch, and on the mean gradient of all "
        "fresh batches.",
        sizes_chart(measured["sizes"]),
    )
    return [*dots, sizes]


def methods_chart(rows: pd.DataFrame) -> alt.LayerChart:
    base = rows[rows["method"] == SUBJECT]
    bounds = [base.assign(method=name, error=base[column]) for name, column in BOUNDS.items()]
    drawn = pd.concat([rows, *bounds])[["method", "layer", "data", "error"]]
    drawn["data"] = drawn["data"].map(NAMES)
    middle = drawn.groupby(["method", "data"], as_index=False)["error"].median()
    own = middle[middle["data"] == NAMES[CALIBRATION]].set_index("method")["error"]
    last = [name for name in (OWN_START, *BOUNDS) if name in own]
    shown = [NAMES[CALIBRATION], NAMES[FRESH]]
    axis = alt.Axis(tickCount=5, format=".1f")
    place = {
        "y": alt.Y(
            "method:N",
            sort=[*own.drop(last).sort_values().index, *last],
            title=None,
            axis=alt.Axis(labelLimit=150),
        ),
        "yOffset": alt.YOffset("data:N", sort=shown),
        "x": alt.X("error:Q", title=ERROR, scale=alt.Scale(domain=[0, 1]), axis=axis),
    }
    dots = (
        chart(drawn)
        .mark_circle(size=16, opacity=0.3)
        .encode(
            **place,
            color=color("data", shown, legend(columns=2, symbolOpacity=1)),
            tooltip=tips("method:N", "layer:N", "error:Q"),
        )
    )
    ticks = (
        chart(middle)
        .mark_tick(thickness=3, size=9, color=INK)
        .encode(**place, tooltip=tips("method:N", "data:N", error=".3f"))
    )
    return (dots + ticks).properties(height=alt.Step(11))


def sizes_chart(sizes: pd.DataFrame) -> alt.LayerChart:
    middle = sizes.groupby(["model", "size", "data"], as_index=False)[["error"]].median()
    below = legend(columns=2, symbolOpacity=1)
    base = chart(middle.assign(data=middle["data"].map(NAMES))).encode(
        x=alt.X(
            "size:Q",
            title="sequences in the calibration",
            scale=alt.Scale(type="log", base=2, padding=12),
            axis=alt.Axis(values=sorted(sizes["size"].unique().tolist())),
        ),
        y=alt.Y("error:Q", title=ERROR[0], scale=alt.Scale(domain=[0, 1])),
        color=color("data", list(NAMES.values()), below),
    )
    points = base.mark_point(filled=True, size=70, opacity=1).encode(
        shape=alt.Shape("model:N", legend=below),
        tooltip=tips("model:N", "data:N", "size:Q", error=".3f"),
    )
    return (base.mark_line().encode(detail="model:N") + points).properties(height=260)


def discuss(measured: Measurement) -> list[str]:
    """The share of the squared gradient in LoRA-GA's step, on its data and on others."""
    rows, sizes = measured["steps"], measured["sizes"]
    sentences = []
    for model, own in rows[rows["method"] == SUBJECT].groupby("model", sort=False):
        energy = (1 - own[["error", "bound"]] ** 2).groupby(own["data"]).mean()
        most = sizes[(sizes["model"] == model) & (sizes["data"] == TOGETHER)]
        most = most[most["size"] == most["size"].max()]
        sentences.append(
            f"{model}: LoRA-GA’s step holds {energy.loc[CALIBRATION, 'error']:.0%} of the squared "
            f"gradient it was calibrated on and {energy.loc[FRESH, 'error']:.0%} of a fresh "
            f"batch’s, of which a step of that rank could hold {energy.loc[FRESH, 'bound']:.0%}. "
            f"Calibrated on {most['size'].iloc[0]} sequences it holds "
            f"{(1 - most['error'] ** 2).mean():.0%} of the mean gradient of all fresh ones."
        )
    return [
        *sentences,
        "All steps are compared at the length that suits each best: only directions count here, "
        "neither the pace that a method’s norms set nor where a longer training ends.",
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
    discuss=discuss,
)

if __name__ == "__main__":
    run(REPRODUCTION)
