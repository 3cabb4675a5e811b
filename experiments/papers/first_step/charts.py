"""Tables and figures of the first step."""

from __future__ import annotations

import altair as alt
import pandas as pd

from experiments.papers.drawing import chart
from experiments.papers.first_step.measuring import CALIBRATION, FRESH, OWN_START, SUBJECT, TOGETHER
from experiments.papers.reproduction import Figure, Table
from experiments.papers.subject import file_name
from experiments.report.canvas import INK

NAMES = {CALIBRATION: "its own data", FRESH: "other films", TOGETHER: "mean of other films"}
COLORS = alt.Scale(domain=list(NAMES.values()), range=["#0072b2", "#d55e00", "#009e73"])
LEGEND = alt.Legend(title=None, orient="bottom", columns=2, symbolOpacity=1)
ERROR = ["relative error of the first step", "0: along the gradient, 1: perpendicular to it"]
BEST, BEST_HALF = "best of rank 2r", "best of rank r"


def tables(rows: pd.DataFrame, sizes: pd.DataFrame) -> list[Table]:
    kinds = [by_kind(rows[rows["model"] == model], model) for model in rows["model"].unique()]
    return [by_method(rows), *kinds, by_size(sizes)]


def by_method(rows: pd.DataFrame) -> Table:
    """Medians over layers (and fresh batches)."""
    parts = []
    for model in rows["model"].unique():
        some = rows[rows["model"] == model]
        found = pd.DataFrame(
            {
                "SGD, own data": medians(some, CALIBRATION, "error"),
                "SGD, other films": medians(some, FRESH, "error"),
                "Adam, other films": medians(some, FRESH, "adam"),
                "Adam beside sign(G)": medians(some, FRESH, "adam_signs"),
            }
        ).sort_values("SGD, own data")
        base = some[some["method"] == SUBJECT]
        for name, column in ((BEST, "bound"), (BEST_HALF, "bound_r")):
            found.loc[name, ["SGD, own data", "SGD, other films"]] = [
                base.loc[base["data"] == data, column].median() for data in (CALIBRATION, FRESH)
            ]
        found = found.rename_axis("method").reset_index()
        parts.append(found.assign(model=model))
    frame = pd.concat(parts, ignore_index=True)
    columns = ["model", *(name for name in frame if name != "model")]
    return Table(
        "methods", "Relative error of the first step, median over layers", frame[columns],
        {name: ".3f" for name in columns[2:]},
        "Columns 3 and 4: SGD’s step beside G. Columns 5 and 6: Adam’s first step beside G, and "
        "beside sign(G), the first step of full fine-tuning by Adam. Methods that change the "
        "model’s function at step 0 are held against their own gradient.",
    )  # fmt: skip


def medians(rows: pd.DataFrame, data: str, column: str) -> pd.Series:
    return rows[rows["data"] == data].groupby("method")[column].median()


def by_kind(rows: pd.DataFrame, model: str) -> Table:
    """Medians over one model's layers of a kind, every method in a row of its own."""
    base = rows[rows["method"] == SUBJECT]
    shown = pd.concat([rows, base.assign(method=BEST, error=base["bound"])])
    parts = []
    for data in (CALIBRATION, FRESH):
        found = shown[shown["data"] == data].pivot_table(
            index="method", columns="kind", values="error", aggfunc="median", sort=False
        )
        found = found.loc[found.mean(axis=1).sort_values().index]
        parts.append(found.rename_axis(columns=None).reset_index().assign(data=NAMES[data]))
    frame = pd.concat(parts, ignore_index=True)
    kinds = [name for name in frame if name not in ("data", "method")]
    return Table(
        f"kinds_{file_name(model)}",
        f"Relative error of SGD’s first step by kind of layer ({model})",
        frame[["data", "method", *kinds]], {name: ".3f" for name in kinds},
        f"Medians over layers (and fresh batches), ordered by their mean over the kinds. {BEST}: "
        "what no step of that rank can beat.",
    )  # fmt: skip


def by_size(sizes: pd.DataFrame) -> Table:
    found = sizes.pivot_table(
        index=["model", "size"], columns="data", values="error", aggfunc="median", sort=False
    )
    frame = pd.DataFrame(
        {
            "own data": found[CALIBRATION],
            "other films, a batch": found[FRESH],
            "their mean": found[TOGETHER],
        }
    ).reset_index()
    return Table(
        "sizes", "LoRA-GA’s relative error by the number of sequences it is calibrated on, median",
        frame.sort_values(["model", "size"]).rename(columns={"size": "sequences"}),
        {name: ".3f" for name in list(frame)[2:]},
        "Their mean: the mean gradient of all fresh batches in the place of one batch’s.",
    )  # fmt: skip


def figures(rows: pd.DataFrame, sizes: pd.DataFrame) -> list[Figure]:
    dots = [
        Figure(
            f"methods_{file_name(model)}",
            f"How far the first step is from the gradient’s ({model})",
            "A dot a layer (and fresh batch), a bar at the median. Blue: on the data that methods "
            "are calibrated on; orange: on other films. Below, what no step of that rank can "
            "beat.",
            methods_chart(rows[rows["model"] == model]),
        )
        for model in rows["model"].unique()
    ]
    return [*dots, Figure(
        "sizes", "LoRA-GA calibrated on more and on less",
        "Median over layers: on its own data, on a fresh batch, and on the mean gradient of all "
        "fresh batches.",
        sizes_chart(sizes),
    )]  # fmt: skip


def methods_chart(rows: pd.DataFrame) -> alt.LayerChart:
    base = rows[rows["method"] == SUBJECT]
    bounds = [
        base.assign(method=name, error=base[column])
        for name, column in ((BEST, "bound"), (BEST_HALF, "bound_r"))
    ]
    drawn = pd.concat([rows, *bounds])[["method", "layer", "data", "error"]]
    drawn = drawn.assign(data=drawn["data"].map(NAMES))
    middle = drawn.groupby(["method", "data"], as_index=False)["error"].median()
    own = middle[middle["data"] == NAMES[CALIBRATION]].set_index("method")["error"]
    measured = own.drop([BEST, BEST_HALF]).sort_values().index
    order = [*(m for m in measured if m != OWN_START)]
    order += [m for m in (OWN_START,) if m in measured] + [BEST, BEST_HALF]
    y = alt.Y("method:N", sort=order, title=None, axis=alt.Axis(labelLimit=150))
    offset = alt.YOffset("data:N", sort=list(NAMES.values())[:2])
    x = alt.X(
        "error:Q", title=ERROR, scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(tickCount=5, format=".1f"),
    )  # fmt: skip
    shown = alt.Scale(domain=list(NAMES.values())[:2], range=["#0072b2", "#d55e00"])
    color = alt.Color("data:N", scale=shown, legend=LEGEND)
    dots = (
        chart(drawn)
        .mark_circle(size=16, opacity=0.3)
        .encode(y=y, yOffset=offset, x=x, color=color, tooltip=["method:N", "layer:N", "error:Q"])
    )
    ticks = (
        chart(middle)
        .mark_tick(thickness=3, size=9, color=INK)
        .encode(
            y=y, yOffset=offset, x=x,
            tooltip=["method:N", "data:N", alt.Tooltip("error:Q", format=".3f")],
        )
    )  # fmt: skip
    return (dots + ticks).properties(height=alt.Step(11))


def sizes_chart(sizes: pd.DataFrame) -> alt.LayerChart:
    middle = sizes.groupby(["model", "size", "data"], as_index=False)[["error"]].median()
    middle = middle.assign(data=middle["data"].map(NAMES))
    x = alt.X(
        "size:Q", title="sequences in the calibration",
        scale=alt.Scale(type="log", base=2, padding=12),
        axis=alt.Axis(values=sorted(sizes["size"].unique().tolist())),
    )  # fmt: skip
    y = alt.Y("error:Q", title="relative error of the first step", scale=alt.Scale(domain=[0, 1]))
    color = alt.Color("data:N", scale=COLORS, legend=LEGEND)
    shape = alt.Shape("model:N", legend=LEGEND)
    lines = chart(middle).mark_line().encode(
        x=x, y=y, color=color, detail="model:N",
    )  # fmt: skip
    points = (
        chart(middle)
        .mark_point(filled=True, size=70, opacity=1)
        .encode(
            x=x, y=y, color=color, shape=shape,
            tooltip=["model:N", "data:N", "size:Q", alt.Tooltip("error:Q", format=".3f")],
        )
    )  # fmt: skip
    return (lines + points).properties(height=260)
