"""The tables and figures of the two starts."""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd

from experiments.papers.drawing import chart
from experiments.papers.rate_scaling.claims import EXPECTED, Exponents
from experiments.papers.rate_scaling.networks import NETWORKS
from experiments.papers.reproduction import Figure, Table
from experiments.report.canvas import SOFT

STARTS = {"A": "Init[A]", "B": "Init[B]"}
COLORS = alt.Scale(domain=list(STARTS.values()), range=["#0072b2", "#d55e00"])
QUANTITIES = {
    "best": "best rate",
    "stable": "largest stable rate",
    "projected": "A h at the best rate",
    "features": "s B A h at the best rate",
}
# By network and start, in the order of QUANTITIES: what signs of gradients add up to.
ALGEBRA = {
    ("square", "A"): (-0.75, -0.75, 0.25, -0.5),
    ("square", "B"): (-1.0, -1.0, 0.0, 0.0),
    ("narrow", "A"): (-0.5, -0.5, 0.5, 0.0),
    ("narrow", "B"): (-1.0, -1.0, 0.0, 0.0),
}


def tables(trainings: pd.DataFrame, compared: pd.DataFrame, exponents: Exponents) -> list[Table]:
    rows = [
        {
            "network": network,
            "start": STARTS[start],
            "quantity": name,
            "by the paper": EXPECTED[start] if quantity in ("best", "stable") else None,
            "by the algebra": algebra,
            "measured": exponents[network, start, quantity].exponent,
            "low": exponents[network, start, quantity].low,
            "high": exponents[network, start, quantity].high,
        }
        for (network, start), powers in ALGEBRA.items()
        for (quantity, name), algebra in zip(QUANTITIES.items(), powers, strict=True)
    ]
    means = by_width(trainings).rename(columns=QUANTITIES | {"loss": "loss at the best rate"})
    formats = dict.fromkeys(("by the paper", "by the algebra", "measured", "low", "high"), ".2f")
    return [
        Table(
            "exponents", "Exponents in the width n, with 95 % intervals", pd.DataFrame(rows),
            formats,
            "The algebra counts entries that move by the learning rate along the signs of the "
            "gradient; in the square network it adds the readout, which the paper’s does not.",
        ),
        Table(
            "rates", "Rates and sizes by width, geometric means over the networks",
            means.assign(start=means["start"].map(STARTS)), {"width": ".0f"},
            "The loss is the mean of the last fifth of the steps over the loss before the first.",
        ),
        Table(
            "ranks", "Loss of the square network at each start’s best rate, by rank",
            losses_by_rank(compared), {"rank": ".0f"},
            "Geometric means over the networks; the ratio is that of the means.",
        ),
    ]  # fmt: skip


def losses_by_rank(compared: pd.DataFrame) -> pd.DataFrame:
    logs = compared.assign(log=np.log(compared["loss"]))
    means = np.exp(logs.pivot_table(index="rank", columns="start", values="log"))
    shown = means.rename(columns=STARTS).reset_index()
    return shown.assign(ratio=(means["A"] / means["B"]).to_numpy()).rename_axis(columns=None)


def by_width(trainings: pd.DataFrame) -> pd.DataFrame:
    """Geometric means over seeds."""
    values = [*QUANTITIES, "loss"]
    logs = trainings.assign(**{name: np.log(trainings[name]) for name in values})
    means = logs.groupby(["network", "start", "width"], sort=False)[values].mean()
    return np.exp(means).reset_index()


def figures(trainings: pd.DataFrame, curves: pd.DataFrame) -> list[Figure]:
    return [
        Figure(
            "widths", "Learning rates against the width",
            "Geometric means over networks; bars reach over all of them. Dashed, the paper’s laws "
            "through the narrowest network: n^(−1/2) for Init[A], n^(−1) for Init[B].",
            rates_against_width(trainings), width=None,
        ),
        Figure(
            "losses", "The loss against the learning rate, a line a width",
            "Loss after training over the loss before, geometric means over networks; cut at 3. "
            "The faster a best rate falls with the width, the further apart are the valleys.",
            losses_against_rate(curves), width=None,
        ),
    ]  # fmt: skip


def rates_against_width(trainings: pd.DataFrame) -> alt.VConcatChart:
    """A row a network, a column a kind of rate."""
    long = trainings.melt(
        id_vars=["network", "start", "width"], value_vars=["best", "stable"], var_name="kind",
        value_name="rate",
    )  # fmt: skip
    long["log"] = np.log(long["rate"])
    grouped = long.groupby(["network", "kind", "start", "width"], as_index=False)
    spread = grouped.agg(middle=("log", "mean"), low=("log", "min"), high=("log", "max"))
    for name in ("middle", "low", "high"):
        spread[name] = np.exp(spread[name])
    spread["law"] = np.nan
    for (_, _, start), some in spread.groupby(["network", "kind", "start"]):
        first = some.loc[some["width"].idxmin()]
        law = first["middle"] * (some["width"] / first["width"]) ** EXPECTED[start]
        spread.loc[some.index, "law"] = law
    spread["start"] = spread["start"].map(STARTS)
    limits = [float(spread[["low", "law"]].min().min()), float(spread["high"].max())]
    return alt.vconcat(
        *(
            alt.hconcat(
                *(
                    panel(
                        spread[(spread["network"] == network) & (spread["kind"] == kind)],
                        f"{QUANTITIES[kind]}, {network}", limits, kind == "best",
                    )
                    for kind in ("best", "stable")
                ),
                spacing=14,
            )
            for network in NETWORKS
        ),
        spacing=22,
    )  # fmt: skip


def panel(some: pd.DataFrame, title: str, limits: list[float], axis: bool) -> alt.LayerChart:
    x = alt.X(
        "width:Q", title="width n",
        scale=alt.Scale(type="log", base=2), axis=alt.Axis(values=sorted(set(some["width"]))),
    )  # fmt: skip
    scale = alt.Scale(type="log", domain=limits, nice=False)
    shown = alt.Axis(format="~e", values=[1e-4, 1e-3, 1e-2, 1e-1], labels=axis)
    y = alt.Y("middle:Q", title="learning rate" if axis else None, scale=scale, axis=shown)
    legend = alt.Legend(title=None, orient="bottom", symbolOpacity=1)
    color = alt.Color("start:N", scale=COLORS, legend=legend)
    base = chart(some)
    law = base.mark_line(strokeDash=[5, 4], opacity=0.6).encode(
        x=x, y=alt.Y("law:Q", title=None, scale=scale, axis=shown), color=color
    )
    bars = base.mark_rule(opacity=0.5, strokeWidth=2).encode(
        x=x, y=alt.Y("low:Q", title=None, scale=scale, axis=shown), y2="high:Q", color=color
    )
    line = base.mark_line(point=alt.OverlayMarkDef(size=45, filled=True)).encode(
        x=x, y=y, color=color,
        tooltip=["start:N", "width:Q", alt.Tooltip("middle:Q", format=".2e", title="rate")],
    )  # fmt: skip
    heading = alt.TitleParams(title, fontSize=12, fontWeight="normal", color=SOFT, anchor="middle")
    return alt.layer(law, bars, line).properties(width=262, height=200, title=heading)


def losses_against_rate(curves: pd.DataFrame) -> alt.FacetChart:
    logs = curves.assign(log=np.log(curves["loss"].clip(upper=3.0)))
    means = logs.groupby(["network", "start", "width", "rate"], as_index=False)["log"].mean()
    means["loss"] = np.exp(means["log"])
    means["start"] = means["start"].map(STARTS)
    return (
        chart(means)
        .mark_line(strokeWidth=1.6)
        .encode(
            x=alt.X(
                "rate:Q", title="learning rate",
                scale=alt.Scale(type="log", nice=False),
                axis=alt.Axis(format="~e", values=[1e-4, 1e-3, 1e-2, 1e-1]),
            ),
            y=alt.Y(
                "loss:Q", title="loss, share of the start",
                scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=4, format="~g"),
            ),
            color=alt.Color(
                "width:O", scale=alt.Scale(scheme="viridis"),
                legend=alt.Legend(title="width n", orient="bottom"),
            ),
            tooltip=["width:O", alt.Tooltip("rate:Q", format=".2e"),
                     alt.Tooltip("loss:Q", format=".3g")],
        )
        .properties(width=262, height=170)
        .facet(
            column=alt.Column("start:N", title=None, header=alt.Header(labelColor=SOFT)),
            row=alt.Row("network:N", title=None, sort=list(NETWORKS),
                        header=alt.Header(labelColor=SOFT)),
        )
    )  # fmt: skip
