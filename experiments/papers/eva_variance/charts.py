"""Tables and figures of EVA's claims."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import pandas as pd

from ...report.canvas import INK, SOFT
from ...report.palette import marks
from ..drawing import chart
from ..reproduction import Figure, Table
from ..subject import file_name
from .claims import TAU
from .costs import FULL_SVD
from .inputs import ANOTHER_ORDER, OTHER_DATA, THE_END

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
CEILING = "most possible"
ORTHONORMAL = "with orthonormal rows"


def variance_table(explained: pd.DataFrame) -> Table:
    found = explained.pivot_table(
        index=["model", "kind", "rank"], columns="method", values=["seen", "fresh"],
        aggfunc="median", sort=False,
    )  # fmt: skip
    frame = pd.DataFrame(
        {
            "EVA, its own data": found["seen", "eva"],
            "EVA, other films": found["fresh", "eva"],
            "kaiming": found["fresh", "kaiming"],
            "gaussian": found["fresh", "gaussian"],
        }
    ).reset_index()
    expected = explained.groupby(["model", "kind", "rank"], sort=False)["random"].first()
    frame["r / n"] = expected.to_numpy()
    return Table(
        "variance", "Share of the inputs’ variance that A’s row space explains, median over blocks",
        frame.rename(columns={"kind": "inputs of"}), {name: ".3f" for name in list(frame)[3:]},
        "Kaiming and gaussian on the data of other films, as the second column of EVA.",
    )  # fmt: skip


def convergence_table(convergence: pd.DataFrame, turning: pd.DataFrame) -> Table:
    middle = by_order(convergence)
    keys = ["model", "batches"]
    one = middle[middle["order"] == 0].pivot(index=keys, columns="against", values="overlap")
    mixed = middle[middle["against"] == ANOTHER_ORDER].groupby(keys)["overlap"].agg(["min", "max"])
    kept = middle[middle["against"] == OTHER_DATA].set_index(keys)["kept"]
    steady = turning.groupby(keys)["cosine"].median()
    frame = pd.DataFrame(
        {
            THE_END: one[THE_END],
            f"{ANOTHER_ORDER}, least": mixed["min"],
            f"{ANOTHER_ORDER}, most": mixed["max"],
            OTHER_DATA: one[OTHER_DATA],
            "variance kept": kept,
            "least cosine": steady,
        }
    ).reset_index()
    return Table(
        "convergence", "Overlap of EVA’s subspace after some batches with others, median over "
        "inputs", frame, {name: ".3f" for name in list(frame)[2:]},
        "With that after all batches; with that after as many batches in each of "
        f"{convergence['order'].nunique()} other orders; with that of all batches of other films, "
        "which are as many as those of the last row. Variance kept: what it explains of other "
        "films’ inputs, of what their own best subspace explains. Least cosine: of a component "
        f"with the one of a batch before, by which EVA stops at {TAU}.",
    )  # fmt: skip


def by_order(convergence: pd.DataFrame) -> pd.DataFrame:
    """Medians over inputs; one row for what no order changes."""
    keys = ["model", "batches", "against", "order"]
    return convergence.groupby(keys, sort=False)[["overlap", "kept"]].median().reset_index()


def gradient_table(gradients: pd.DataFrame) -> Table:
    parts = []
    for model, some in gradients.groupby("model", sort=False):
        raw = some.pivot_table(index="layer", columns="method", values="raw")
        relative = raw.div(raw["kaiming"], axis=0).median()
        middle = some.groupby("method")[["norm_A", "equal_norm", "span", "random"]].median()
        found = pd.DataFrame(
            {
                "E‖∇B‖² / kaiming’s": relative,
                "‖A‖": middle["norm_A"],
                "at equal ‖A‖": middle["equal_norm"],
                ORTHONORMAL: middle["span"],
                "r / n": middle["random"],
            }
        ).sort_values(ORTHONORMAL, ascending=False)
        found = found.rename_axis("method").reset_index()
        ceiling = some.groupby("layer")["ceiling"].first().median()
        found.loc[len(found), ["method", ORTHONORMAL]] = [CEILING, ceiling]
        parts.append(found.assign(model=model))
    frame = pd.concat(parts, ignore_index=True)
    frame = frame[["model", *(name for name in frame if name != "model")]]
    return Table(
        "gradients", "The first gradient of B by method, median over layers", frame,
        {"at equal ‖A‖": ".3f", ORTHONORMAL: ".3f", "r / n": ".3f"},
        "At s = 1, over batches that no method has seen. The last columns are relative to E‖G‖²: "
        "r E‖G Aᵀ‖² / ‖A‖², which can exceed 1 where the rows of A are nearly parallel, and the "
        "share that A’s row space holds, as if its rows were orthonormal.",
    )  # fmt: skip


def ranks_table(ranks: pd.DataFrame) -> Table:
    frame = (
        ranks.groupby(["model", "kind"], sort=False)["rank"]
        .agg(["mean", "min", "max"])
        .reset_index()
        .rename(columns={"mean": "mean rank", "min": "least", "max": "most"})
    )
    return Table("ranks", "Ranks that EVA chooses, by kind of layer", frame, {"mean rank": ".1f"})


def costs_table(costs: pd.DataFrame, model: str) -> Table:
    frame = costs.rename(
        columns={
            "steps": "training steps", "share": "% of an epoch here", "paper": "% in the paper",
        }
    )  # fmt: skip
    return Table(
        "costs", f"What a start costs ({model})", frame,
        {"seconds": ".2f", "training steps": ".1f", "% of an epoch here": ".2f",
         "% in the paper": ".1f"},
        "Seconds of the initialization without injection, wall clock. The paper’s epoch is many "
        "times longer than this one; training steps do not depend on that.",
    )  # fmt: skip


def variance_figure(explained: pd.DataFrame, model: str) -> Figure:
    """By kind of input; a random A lies at r / n for each width."""
    some = explained[explained["model"] == model]
    eva = some[some["method"] == "eva"].groupby(["kind", "rank"], as_index=False, sort=False)
    drawn = eva[["fresh", "random"]].median()
    random = some[some["method"] == "kaiming"].groupby("rank", as_index=False)["fresh"].median()
    kinds = drawn["kind"].unique().tolist()
    ranks = sorted(drawn["rank"].unique().tolist())
    x = alt.X(
        "rank:Q", scale=alt.Scale(type="log", base=2), title="rank", axis=alt.Axis(values=ranks)
    )
    y = alt.Y("fresh:Q", title="share of the variance, other films", axis=alt.Axis(format="%"),
              scale=alt.Scale(domain=[0, 1]))  # fmt: skip
    color = alt.Color(
        "kind:N", scale=alt.Scale(domain=kinds, range=list(COLORS[: len(kinds)])),
        legend=alt.Legend(title="EVA, inputs of", orient="bottom", columns=3, labelLimit=200),
    )  # fmt: skip
    lines = chart(drawn).mark_line(point=True).encode(
        x=x, y=y, color=color,
        tooltip=["kind:N", "rank:Q", alt.Tooltip("fresh:Q", format=".1%")],
    )  # fmt: skip
    flat = chart(random).mark_line(strokeDash=[4, 4], color=SOFT).encode(x=x, y=y)
    told = chart(random.tail(1)).mark_text(
        text="a random A", color=SOFT, dy=-9, align="right", fontSize=12
    ).encode(x=x, y=y)  # fmt: skip
    return Figure(
        f"variance_{file_name(model)}", f"Variance that the first directions explain ({model})",
        "Measured on films that EVA has not seen, median over blocks. Dashed: kaiming’s A, median "
        "over all inputs, about r / n.",
        (lines + flat + told).properties(height=280),
    )  # fmt: skip


def convergence_figure(convergence: pd.DataFrame, orders: int) -> Figure:
    middle = by_order(convergence)
    keys = ["model", "batches", "against"]
    drawn = middle.groupby(keys, as_index=False)["overlap"].median()
    kept = middle[middle["against"] == OTHER_DATA][["model", "batches", "kept"]]
    kept = kept.rename(columns={"kept": "overlap"}).assign(against="variance kept")
    drawn = pd.concat([drawn, kept], ignore_index=True)
    order = [THE_END, ANOTHER_ORDER, OTHER_DATA, "variance kept"]
    models = drawn["model"].unique().tolist()
    line = alt.StrokeDash(
        "model:N", scale=alt.Scale(domain=models, range=[[1, 0], [5, 3], [2, 2]][: len(models)]),
        legend=alt.Legend(
            title=None, orient="top", symbolType="stroke", symbolStrokeWidth=2,
            symbolStrokeColor=SOFT, symbolSize=500,
        ),
    )  # fmt: skip
    common = (
        chart(drawn)
        .encode(
            x=alt.X("batches:Q", scale=alt.Scale(type="log", base=2), title="batches",
                    axis=alt.Axis(values=sorted(set(drawn["batches"].tolist())))),
            y=alt.Y("overlap:Q", title="overlap, or share", scale=alt.Scale(zero=False)),
            color=alt.Color(
                "against:N",
                scale=alt.Scale(domain=order, range=["#0072b2", "#009e73", "#d55e00", INK]),
                legend=alt.Legend(title=None, orient="bottom", columns=2),
            ),
            tooltip=["model:N", "against:N", "batches:Q", alt.Tooltip("overlap:Q", format=".3f")],
        )
        .properties(height=280)
    )  # fmt: skip
    # Points that are a part of the line's mark would take the dashes' legend from it.
    drawing = common.mark_line().encode(strokeDash=line) + common.mark_point(
        filled=True, size=40, opacity=1
    )
    return Figure(
        "convergence", "How soon the directions are found",
        "Overlap of EVA’s subspace with that after all batches, with that after as many in another "
        f"order (the middle one of {orders}), and with that of all batches of other films; and the "
        "variance it keeps there of the best possible. Medians over inputs.", drawing,
    )  # fmt: skip


def ranks_figure(ranks: pd.DataFrame, model: str, rank: int, rho: float) -> Figure:
    some = ranks[ranks["model"] == model]
    kinds = some["kind"].unique().tolist()
    many = some["block"].nunique() > 12
    drawing = (
        chart(some)
        .mark_rect(stroke="white", strokeWidth=1)
        .encode(
            x=alt.X("block:O", title="block", axis=alt.Axis(
                labelAngle=0, values=list(range(0, 1 + int(some["block"].max()), 5 if many else 1)),
            )),
            y=alt.Y("kind:N", sort=kinds, title=None),
            color=alt.Color(
                "rank:Q", scale=alt.Scale(scheme="viridis", domain=[0, rank * rho]),
                legend=alt.Legend(title="rank", orient="bottom", gradientLength=200),
            ),
            tooltip=["layer:N", "rank:Q"],
        )
        .properties(height=alt.Step(26))
    )  # fmt: skip
    return Figure(
        f"ranks_{file_name(model)}", f"Ranks that EVA gives to each layer ({model})",
        f"From {rank} each, rho = {rho:g}: between 0 and {rank * rho:g}, with the same sum.",
        drawing,
    )  # fmt: skip


def gradients_figure(gradients: pd.DataFrame, model: str) -> Figure:
    some = gradients[gradients["model"] == model]
    ceiling = some[some["method"] == "eva"].assign(method=CEILING)
    ceiling = ceiling.assign(span=ceiling["ceiling"])
    drawn = pd.concat([some, ceiling])[["method", "layer", "span"]]
    middle = drawn.groupby("method", as_index=False)["span"].median()
    order = middle.sort_values("span", ascending=False)["method"].tolist()
    methods = [name for name in order if name != CEILING]
    chosen = marks(methods)
    y = alt.Y("method:N", sort=order, title=None, axis=alt.Axis(labelLimit=150))
    x = alt.X(
        "span:Q", scale=alt.Scale(type="log"),
        axis=alt.Axis(format="~%", values=[1e-4, 1e-3, 1e-2, 0.1, 1]),
        title="share of the gradient’s energy, A with orthonormal rows",
    )  # fmt: skip
    color = alt.Color(
        "method:N", legend=None,
        scale=alt.Scale(domain=[*methods, CEILING],
                        range=[*(chosen[m].color for m in methods), INK]),
    )  # fmt: skip
    dots = chart(drawn).mark_circle(size=22, opacity=0.4).encode(
        x=x, y=y, color=color, tooltip=["method:N", "layer:N", "span:Q"],
    )  # fmt: skip
    ticks = chart(middle).mark_tick(thickness=3, size=13, color=INK).encode(
        x=x, y=y, tooltip=["method:N", alt.Tooltip("span:Q", format=".3f")],
    )  # fmt: skip
    width = float(some["random"].median())
    random = chart(pd.DataFrame({"span": [width]})).mark_rule(
        strokeDash=[4, 4], color=SOFT
    ).encode(x="span:Q")  # fmt: skip
    return Figure(
        f"gradients_{file_name(model)}",
        f"The first gradient of B, A with orthonormal rows ({model})",
        "A dot a layer, a bar at the median. Dashed: r / n, a random A’s. The most possible are "
        "the first eigenvectors of E GᵀG, which take the gradients themselves to find.",
        (random + dots + ticks).properties(height=alt.Step(17)),
    )  # fmt: skip


def costs_figure(costs: pd.DataFrame) -> Figure:
    short = {FULL_SVD: "full SVD"}
    drawn = costs.assign(method=costs["method"].replace(short))
    order = drawn.sort_values("steps")["method"].tolist()
    chosen: Mapping = marks(order)
    y = alt.Y("method:N", sort=order, title=None)
    x = alt.X(
        "steps:Q", scale=alt.Scale(type="log"), title="training steps of the same time",
        axis=alt.Axis(values=[0.01, 0.1, 1, 10, 100, 1000]),
    )  # fmt: skip
    dots = chart(drawn).mark_circle(size=110, opacity=1).encode(
        x=x, y=y,
        color=alt.Color("method:N", legend=None, scale=alt.Scale(
            domain=order, range=[chosen[m].color for m in order])),
        tooltip=["method:N", "seconds:Q", "steps:Q"],
    )  # fmt: skip
    labels = chart(drawn).mark_text(align="left", dx=9, color=INK, fontSize=12).encode(
        x=x, y=y, text=alt.Text("steps:Q", format=".2~g")
    )  # fmt: skip
    return Figure(
        "costs", "What a start costs, in training steps",
        "Time of the initialization over that of one training step at the same batch size.",
        (dots + labels).properties(height=alt.Step(24)),
    )  # fmt: skip
