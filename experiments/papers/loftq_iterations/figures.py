"""Tables and figures."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ...report.canvas import INK, SOFT
from ..drawing import chart, methods_color
from ..reproduction import Figure, Table
from .iteration_claims import (
    CASE,
    ERRORS,
    later_iterations,
    rises,
)
from .starts import (
    LOFTQ,
    LOFTQ_QERA,
    METHODS,
    PLAIN,
    QPISSA,
    SVD_FIRST,
)

ALTERNATING = (LOFTQ, SVD_FIRST, QPISSA)
DASHED = alt.condition(
    alt.FieldOneOfPredicate("method", list(ALTERNATING)), alt.value([1, 0]), alt.value([5, 3])
)


def shares(models: pd.DataFrame) -> pd.DataFrame:
    """Every error in percent of what plain quantization at the same bits and rank has."""
    index = pd.MultiIndex.from_frame(models[CASE])
    plain = models[models["method"] == PLAIN].set_index(CASE)
    shown = models.copy()
    for name in ERRORS:
        shown[name] = 100 * models[name].to_numpy() / plain[name].reindex(index).to_numpy()
    return shown


def models_table(models: pd.DataFrame, name: str, title: str, last: str) -> Table:
    """Means over layers, and the whole model."""
    frame = pd.DataFrame(
        {
            "start": models["method"],
            "T": models["T"].map(lambda count: str(count) if count else "–"),
            "bits": models["bits"],
            "rank": models["rank"],
            "weights": models["weight"],
            "outputs": models["output"],
            "outputs, calibration": models["seen"],
            last: models["error"],
        }
    )
    if models["perplexity"].notna().all():
        frame["perplexity"] = models["perplexity"]
    digits = dict.fromkeys(("weights", "outputs", "outputs, calibration", last), ".4f")
    return Table(
        name, title, frame, digits | {"perplexity": ".2f"},
        note="Relative errors, means over the layers; outputs on held-out text, and on the text "
        "that QERA was calibrated on.",
    )  # fmt: skip


def methods_shape(methods: list[str]) -> alt.Shape:
    """LoftQ's two in two shapes: their greens are near."""
    shapes = {SVD_FIRST: "square", LOFTQ_QERA: "diamond", QPISSA: "triangle-up"}
    scale = alt.Scale(domain=methods, range=[shapes.get(m, "circle") for m in methods])
    return alt.Shape("method:N", scale=scale, legend=None)


def iterations_figure(models: pd.DataFrame) -> Figure:
    """The paper's figure: error against T, a panel a measure and number of bits."""
    rank = int(models["rank"].max())
    some = shares(models[models["rank"] == rank])
    counts = sorted(some.loc[some["method"] == LOFTQ, "T"].unique())
    some = some[some["method"] != PLAIN].melt(
        ["method", "T", "bits"], list(ERRORS), var_name="measure", value_name="share"
    )
    flat = some[some["T"] == 0].drop(columns="T").merge(
        pd.DataFrame({"T": [counts[0], counts[-1]]}), how="cross"
    )  # fmt: skip
    shown = pd.concat([some[some["T"] > 0], flat], ignore_index=True)
    shown["point"] = shown["method"].isin([*ALTERNATING, LOFTQ_QERA])
    shown["measure"] = shown["measure"].map(ERRORS)
    shown["bits"] = shown["bits"].astype(str) + " bits"
    order = [f"{bits} bits" for bits in sorted(models["bits"].unique(), reverse=True)]
    methods = [m for m in METHODS if m in set(shown["method"])]
    base = chart(shown).encode(
        x=alt.X("T:Q", title="iterations T", axis=alt.Axis(values=[int(c) for c in counts])),
        y=alt.Y("share:Q", title="% of plain", scale=alt.Scale(zero=False)),
        color=methods_color(methods),
        tooltip=["method:N", "T:Q", alt.Tooltip("share:Q", format=".1f")],
    )
    drawing = (
        alt.layer(
            base.mark_line().encode(strokeDash=DASHED),
            base.transform_filter("datum.point")
            .mark_point(filled=True, size=55, opacity=1)
            .encode(shape=methods_shape(methods)),
        )
        .properties(width=160, height=120)
        .facet(
            row=alt.Row(
                "measure:N", sort=list(ERRORS.values()), title=None,
                header=alt.Header(labelColor=SOFT, labelFontSize=12),
            ),
            column=alt.Column(
                "bits:N", sort=order, title=None,
                header=alt.Header(labelColor=SOFT, labelFontSize=12),
            ),
            spacing=14,
        )
    )  # fmt: skip
    return Figure(
        "iterations", f"Error against iterations, rank {rank}",
        "In percent of what plain quantization at the same bits loses: of the weights, of the "
        "layers’ outputs on held-out text, of the whole model’s last hidden states. Dashed: not "
        "iterated. A point at one T stands for itself.",
        drawing, width=None,
    )  # fmt: skip


def agreement_figure(models: pd.DataFrame) -> Figure:
    """The model's error against the layers' two errors."""
    shown = shares(models)
    shown = shown[shown["method"] != PLAIN].melt(
        ["method", "T", "bits", "rank", "error"], ["weight", "output"],
        var_name="measure", value_name="share",
    )  # fmt: skip
    shown["measure"] = shown["measure"].map(
        {"weight": "against the weights’ error", "output": "against the outputs’ error"}
    )
    shown["bits"] = shown["bits"].astype(str)
    methods = [m for m in METHODS if m in set(shown["method"])]
    drawing = (
        chart(shown)
        .mark_point(filled=True, size=55, opacity=0.85)
        .encode(
            x=alt.X("share:Q", title="error of the layers, % of plain",
                    axis=alt.Axis(tickCount=5), scale=alt.Scale(zero=False)),
            y=alt.Y("error:Q", title="error of the model, % of plain",
                    scale=alt.Scale(zero=False)),
            color=methods_color(methods),
            shape=alt.Shape("bits:N", sort=["8", "4", "2"],
                            legend=alt.Legend(title="bits", orient="bottom")),
            tooltip=["method:N", "T:Q", "bits:N", "rank:Q",
                     alt.Tooltip("share:Q", format=".1f"), alt.Tooltip("error:Q", format=".1f")],
        )
        .properties(width=250, height=240)
        .facet(
            alt.Column("measure:N", title=None, sort=["against the weights’ error"],
                       header=alt.Header(labelColor=SOFT, labelFontSize=12)),
            spacing=18,
        )
        .resolve_scale(x="independent")
    )  # fmt: skip
    return Figure(
        "agreement", "Which error of the layers the whole model follows",
        "A point a start, bits and rank. The nearer the points to one rising line, the better the "
        "layers’ error tells what the model loses.", drawing, width=None,
    )  # fmt: skip


def layers_figure(layers: pd.DataFrame) -> Figure:
    """What later iterations do to each layer of the encoder."""
    later = later_iterations(layers)
    ratios = rises(layers, later).reset_index()
    ratios["bits"] = ratios["bits"].astype(str)
    points = (
        chart(ratios)
        .mark_point(filled=True, size=40, opacity=0.75)
        .encode(
            x=alt.X("weight:Q", title=f"weight’s error, T = {later} over T = 1",
                    scale=alt.Scale(zero=False)),
            y=alt.Y("output:Q", title=f"output’s error, T = {later} over T = 1",
                    scale=alt.Scale(zero=False)),
            color=alt.Color("bits:N", sort=["8", "4", "2"],
                            scale=alt.Scale(range=["#8b949e", "#0072b2", "#d55e00"]),
                            legend=alt.Legend(title="bits", orient="bottom")),
            tooltip=["layer:N", "bits:N", "rank:Q", alt.Tooltip("weight:Q", format=".3f"),
                     alt.Tooltip("output:Q", format=".3f")],
        )
    )  # fmt: skip
    level = (
        chart(pd.DataFrame({"one": [1.0]}))
        .mark_rule(color=INK, strokeDash=[4, 3])
        .encode(y=alt.Y("one:Q"))
    )
    return Figure(
        "layers", "LoftQ’s later iterations, layer by layer",
        "Above the dashed line the outputs have become worse, although the weights came nearer.",
        alt.layer(level, points).properties(height=280),
    )  # fmt: skip


def perplexity_figure(models: pd.DataFrame, original: float) -> Figure:
    """The language model at 4 bits and the largest rank, a bar a start from the unquantized."""
    rank = int(models["rank"].max())
    shown = models[(models["bits"] == 4) & (models["rank"] == rank)].sort_values("perplexity")
    shown = shown.assign(
        start=[
            f"{method}, T = {count}" if count else method
            for method, count in zip(shown["method"], shown["T"], strict=True)
        ],
        original=original,
    )
    methods = [m for m in METHODS if m in set(shown["method"])]
    base = chart(shown[["start", "method", "perplexity", "original"]]).encode(
        y=alt.Y("start:N", sort=list(shown["start"]), title=None)
    )
    x = alt.X(
        "perplexity:Q",
        title="perplexity, held-out film plots",
        scale=alt.Scale(zero=False),
        axis=alt.Axis(tickCount=5),
    )
    bars = base.mark_rule(strokeWidth=3).encode(
        x=x, x2="original:Q", color=methods_color(methods, legend=False)
    )
    ends = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=x, color=methods_color(methods, legend=False), tooltip=["start:N", "perplexity:Q"]
    )
    words = base.mark_text(align="left", dx=9, color=INK).encode(
        x=x, text=alt.Text("perplexity:Q", format=".2f")
    )
    return Figure(
        "perplexity", f"Perplexity of the language model at 4 bits, rank {rank}",
        f"Each line begins at the unquantized model’s {original:.2f}.",
        alt.layer(bars, ends, words).properties(height=alt.Step(30)),
    )  # fmt: skip


def divergence_figure(models: pd.DataFrame) -> Figure:
    """The language model's logit error by rank, a panel a number of bits, a line a start."""
    shown = models.assign(
        start=[
            f"{method}, T = {count}" if method == LOFTQ else method
            for method, count in zip(models["method"], models["T"], strict=True)
        ],
        bits=models["bits"].astype(str) + " bits",
    )
    methods = [m for m in METHODS if m in set(shown["method"])]
    last = f"T = {models['T'].max()}"
    base = chart(shown[["start", "method", "T", "rank", "bits", "error"]]).encode(
        x=alt.X("rank:O", title="rank", axis=alt.Axis(labelAngle=0, grid=False)),
        y=alt.Y("error:Q", title="KL, nats a token", scale=alt.Scale(type="log", nice=False)),
        color=methods_color(methods),
        detail="start:N",
        tooltip=["start:N", "bits:N", "rank:O", alt.Tooltip("error:Q", format=".3g")],
    )
    order = sorted(set(shown["bits"]), key=lambda told: -int(told.split()[0]))
    drawing = (
        alt.layer(
            base.mark_line().encode(
                strokeDash=alt.condition(
                    f"datum.start === '{LOFTQ}, {last}'", alt.value([1, 0]), alt.value([5, 3])
                )
            ),
            base.mark_point(filled=True, size=55, opacity=1),
        )
        .properties(width=220, height=220)
        .facet(
            alt.Column("bits:N", sort=order, title=None,
                       header=alt.Header(labelColor=SOFT, labelFontSize=12)),
            spacing=18,
        )
        .resolve_scale(y="independent")
    )  # fmt: skip
    return Figure(
        "divergence", "The language model’s logit error by rank and bits",
        f"KL(original ‖ quantized) of the next token on held-out film plots. Solid: LoftQ at "
        f"{last}; dashed: all others.",
        drawing, width=None,
    )  # fmt: skip
