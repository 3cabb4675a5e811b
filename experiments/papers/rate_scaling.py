"""Init[A] and Init[B]: how the learning rate must fall as a network grows wider.

One adapted layer z = W h + s B A h, h of width n. Init[A] draws A and sets B = 0, as LoRA does;
Init[B] draws B and sets A = 0. Under Adam every entry of a factor moves by about the learning rate
η a step, along the sign of its gradient, so the sizes are known up to constants:

                    A h             s B A h          A h and s B A h stay bounded for
    Init[A]         1 + η n         η (1 + η n)      s B A h: η ≤ n^(-1/2), where A h = n^(1/2)
    Init[B]         η n             η n (1 + η)      both: η ≤ n^(-1)

The paper concludes that Init[A] needs a rate that falls as n^(-1/2), and Init[B] one that falls as
n^(-1); that Init[A] therefore learns its features better; and that A h grows as n^(1/2) under
Init[A], an internal instability.

Two teacher-student networks are measured (`rate_scaling_rows`). "square": the adapted matrix is
n × n, and a readout with entries of 1/√n follows, as in the paper's simulation. "narrow": the
adapted matrix is m × n with m fixed, so that nothing behind the adapter grows, as the algebra above
assumes. In the square network B moves along the signs of the readout's entries, and n aligned
entries of 1/√n add up to √n. The loss then limits Init[A]: η² n · √n ≤ 1, so η ≤ n^(-3/4).
Init[B]'s random B adds up to 1 and keeps its n^(-1).

Source: Hayou, Ghosh & Yu 2024, "The Impact of Initialization on LoRA Finetuning Dynamics", arXiv
2406.08447, section 3.
"""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd

from .application import run
from .claim import Claim, judge
from .drawing import HEADER, LOG, SOFT, chart, color, legend, tips
from .interval import Interval, fit_exponent, geometric_mean
from .rate_scaling_rows import NETWORKS, RateScalingOptions, measure
from .reproduction import Figure, Measurement, Reproduction, Table

EXPECTED = {"A": -0.5, "B": -1.0}
OTHER = {"A": EXPECTED["B"], "B": EXPECTED["A"]}
TOLERANCE = 0.15
DESCRIBED = {
    "square": "in a square network, with a readout behind the adapter",
    "narrow": "in a narrow network, with nothing growing behind the adapter",
}
POWERS = {-0.5: "n^(-1/2)", -1.0: "n^(-1)"}
READOUT = -0.75  # Init[A]'s exponent behind the square network's readout
Exponents = dict[tuple[str, str, str], Interval]
STARTS = {"A": "Init[A]", "B": "Init[B]"}
QUANTITIES = {
    "best": "best rate",
    "stable": "largest stable rate",
    "projected": "A h at the best rate",
    "features": "s B A h at the best rate",
}
# By network and start, in the order of QUANTITIES: the sums of the signs of gradients.
ALGEBRA = {
    ("square", "A"): (-0.75, -0.75, 0.25, -0.5),
    ("square", "B"): (-1.0, -1.0, 0.0, 0.0),
    ("narrow", "A"): (-0.5, -0.5, 0.5, 0.0),
    ("narrow", "B"): (-1.0, -1.0, 0.0, 0.0),
}
RATES = [1e-4, 1e-3, 1e-2, 1e-1]


def fit_all(trainings: pd.DataFrame) -> Exponents:
    """By network, start and quantity: the exponent in the width, over all widths and seeds."""
    return {
        (network, start, quantity): fit_exponent(some["width"].tolist(), some[quantity].tolist())
        for (network, start), some in trainings.groupby(["network", "start"])
        for quantity in QUANTITIES
    }


def judge_all(measured: Measurement) -> list[Claim]:
    """Laws of the rates, then what follows from them."""
    trainings = measured["trainings"]
    exponents = fit_all(trainings)
    return [
        *(scaling_claim(exponents, network, start) for network in NETWORKS for start in EXPECTED),
        tolerance_claim(trainings),
        loss_claim(measured["compared"]),
        instability_claim(exponents),
    ]


def scaling_claim(exponents: Exponents, network: str, start: str) -> Claim:
    """The exponents of the best and of the largest stable rate."""
    fits = [exponents[network, start, quantity] for quantity in ("best", "stable")]
    expected, other = EXPECTED[start], OTHER[start]
    holds = law_holds(exponents, network, start)
    nearer = all(abs(fit.value - expected) < abs(fit.value - other) for fit in fits)
    return Claim(
        statement=f"Init[{start}]’s best and largest stable learning rates fall with the width n "
        f"as {POWERS[expected]} {DESCRIBED[network]}",
        paper=f"{POWERS[expected]} as n grows (theory); a simulation is in line with it",
        ours=f"best rate ∝ n^{fits[0]}, largest stable rate ∝ n^{fits[1]}",
        criterion=f"both exponents within {TOLERANCE} of {expected:g}, and their intervals exclude "
        f"{other:g}; same direction: both nearer to {expected:g} than to {other:g}, and below 0 "
        "beyond their intervals; contradicts: both above 0 beyond their intervals",
        verdict=judge(
            holds=holds,
            direction=nearer and all(fit.high < 0 for fit in fits),
            opposite=all(fit.low > 0 for fit in fits),
        ),
        remark="" if holds else readout_remark(exponents, network, start),
    )


def law_holds(exponents: Exponents, network: str, start: str) -> bool:
    """Whether both exponents follow the start's law and their intervals exclude the other law."""
    return all(
        abs(fit.value - EXPECTED[start]) <= TOLERANCE and not fit.contains(OTHER[start])
        for fit in (exponents[network, start, quantity] for quantity in ("best", "stable"))
    )


def readout_remark(exponents: Exponents, network: str, start: str) -> str:
    """Why the readout changes Init[A]'s law, if the measured exponent is that of the readout."""
    best, projected, features = (
        exponents[network, start, name] for name in ("best", "projected", "features")
    )
    if (network, start) != ("square", "A") or abs(best.value - READOUT) > TOLERANCE:
        return ""
    return (
        "A readout with n entries of 1/√n behind the adapter adds up what B learns along their "
        "signs, so the loss binds the rate before the features do: η² n · √n ≤ 1 gives −3/4, with "
        f"A h growing as n^(1/4) (measured: n^{projected.value:.2f}) and s B A h falling as "
        f"n^(−1/2) (measured: n^{features.value:.2f}); the narrow network, where that sum is "
        "absent, is the check."
    )


def ratios(trainings: pd.DataFrame, quantity: str, by: str) -> pd.Series:
    """Init[A] over Init[B] on the same network, by width or rank, and by seed."""
    table = trainings.pivot_table(index=[by, "seed"], columns="start", values=quantity)
    return table["A"] / table["B"]


def tolerance_claim(trainings: pd.DataFrame) -> Claim:
    """The largest stable rates, Init[A]'s over Init[B]'s."""
    shown, larger, grows = [], [], []
    for network in NETWORKS:
        found = ratios(trainings[trainings["network"] == network], "stable", "width")
        means = np.exp(np.log(found).groupby("width").mean())
        fit = fit_exponent(found.index.get_level_values("width").tolist(), found.tolist())
        shown.append(f"{network}: {means.iloc[0]:.2g} → {means.iloc[-1]:.2g}, ∝ n^{fit}")
        larger.append(bool((means > 1).all()))
        grows.append(fit)
    widths = sorted(trainings["width"].unique())
    return Claim(
        statement="Init[A] stands a larger learning rate than Init[B], the more so the wider the "
        "network",
        paper="the ratio grows as n^(1/2)",
        ours=f"largest stable rates, Init[A] over Init[B], n = {widths[0]} → {widths[-1]}: "
        + "; ".join(shown),
        criterion="in both networks the ratio is above 1 at every width and its exponent is above "
        "0 beyond its interval; same direction: both exponents above 0; contradicts: both below 0 "
        "beyond their intervals",
        verdict=judge(
            holds=all(larger) and all(fit.low > 0 for fit in grows),
            direction=all(fit.value > 0 for fit in grows),
            opposite=all(fit.high < 0 for fit in grows),
        ),
    )


def loss_claim(compared: pd.DataFrame) -> Claim:
    """The loss at each start's own best rate, by rank."""
    found = {
        rank: geometric_mean(some.to_numpy())
        for rank, some in ratios(compared, "loss", "rank").groupby("rank")
    }
    shown = [f"r = {rank}: {ratio.show('.2f')}" for rank, ratio in found.items()]
    width = compared["width"].iloc[0]
    first, last = found[min(found)].value, found[max(found)].value
    remark = ""
    if first < 1 < last:
        remark = (
            f"The order turns with the rank: Init[A] is ahead at r = {min(found)} and behind at "
            f"r = {max(found)}. These are losses on the examples that were trained on; the paper’s "
            "language models are not measured."
        )
    return Claim(
        statement="At its own best rate Init[A] learns better than Init[B]",
        paper="better on average, in the simulation and for RoBERTa and Llama",
        ours=f"loss of Init[A] over that of Init[B], square network, n = {width}: "
        + ", ".join(shown),
        criterion="the ratio is below 1 at every rank, beyond its interval at one or more; same "
        "direction: their geometric mean over the ranks is below 1; contradicts: above 1 beyond "
        "its interval at every rank",
        verdict=judge(
            holds=all(ratio.value < 1 for ratio in found.values())
            and any(ratio.high < 1 for ratio in found.values()),
            direction=float(np.mean([np.log(ratio.value) for ratio in found.values()])) < 0,
            opposite=all(ratio.low > 1 for ratio in found.values()),
        ),
        remark=remark,
    )


def instability_claim(exponents: Exponents) -> Claim:
    """How A h grows at the best rate."""
    shown, grows, bounded = [], [], []
    for network in NETWORKS:
        first, second = (exponents[network, start, "projected"] for start in ("A", "B"))
        shown.append(f"{network}: n^{first} against n^{second}")
        grows.append(first.low > 0)
        bounded.append(abs(second.value) <= TOLERANCE)
    ahead = [
        exponents[network, "A", "projected"].value > exponents[network, "B", "projected"].value
        for network in NETWORKS
    ]
    return Claim(
        statement="Init[A] pays with an internal instability: what A makes of its input, A h, "
        "grows with the width; under Init[B] it does not",
        paper="n^(1/2) against n^0, by the algebra",
        ours=f"A h at the best rate, Init[A] against Init[B]: {'; '.join(shown)}",
        criterion="in both networks Init[A]’s exponent is above 0 beyond its interval and Init[B]’s"
        f" within {TOLERANCE} of 0; same direction: Init[A]’s exponent is the larger in both; "
        "contradicts: it is the larger in neither",
        verdict=judge(
            holds=all(grows) and all(bounded),
            direction=all(ahead),
            opposite=not any(ahead),
        ),
    )


def tabulate(measured: Measurement) -> list[Table]:
    """Exponents, rates by width, and losses by rank."""
    trainings = measured["trainings"]
    exponents = fit_all(trainings)
    rows = [
        {
            "network": network,
            "start": STARTS[start],
            "quantity": name,
            "by the paper": EXPECTED[start] if quantity in ("best", "stable") else None,
            "by the algebra": algebra,
            "measured": exponents[network, start, quantity].value,
            "low": exponents[network, start, quantity].low,
            "high": exponents[network, start, quantity].high,
        }
        for (network, start), powers in ALGEBRA.items()
        for (quantity, name), algebra in zip(QUANTITIES.items(), powers, strict=True)
    ]
    values = [*QUANTITIES, "loss"]
    widths = geometric_means(trainings, ["network", "start", "width"], values)
    widths["start"] = widths["start"].map(STARTS)
    ranks = geometric_means(measured["compared"], ["rank", "start"], ["loss"])
    ranks = ranks.pivot(index="rank", columns="start", values="loss").rename(columns=STARTS)
    ranks["ratio"] = ranks["Init[A]"] / ranks["Init[B]"]
    formats = dict.fromkeys(("by the paper", "by the algebra", "measured", "low", "high"), ".2f")
    return [
        Table(
            "exponents",
            "Exponents in the width n, with 95 % intervals",
            pd.DataFrame(rows),
            formats,
            "The algebra counts entries that move by the learning rate along the signs of the "
            "gradient; in the square network it adds the readout, which the paper’s does not.",
        ),
        Table(
            "rates",
            "Rates and sizes by width, geometric means over the networks",
            widths.rename(columns=QUANTITIES | {"loss": "loss at the best rate"}),
            {"width": ".0f"},
            "The loss is the mean of the last fifth of the steps over the loss before the first.",
        ),
        Table(
            "ranks",
            "Loss of the square network at each start’s best rate, by rank",
            ranks.reset_index().rename_axis(columns=None),
            {"rank": ".0f"},
            "Geometric means over the networks; the ratio is that of the means.",
        ),
    ]


def geometric_means(rows: pd.DataFrame, keys: list[str], values: list[str]) -> pd.DataFrame:
    """Geometric means by some keys."""
    logs = rows.assign(**{name: np.log(rows[name]) for name in values})
    return np.exp(logs.groupby(keys, sort=False)[values].mean()).reset_index()


def draw(measured: Measurement) -> list[Figure]:
    """Rates over the width, and losses over the rates."""
    return [
        Figure(
            "widths",
            "Learning rates against the width",
            "Geometric means over networks; bars reach over all of them. Dashed, the paper’s laws "
            "through the narrowest network: n^(−1/2) for Init[A], n^(−1) for Init[B].",
            widths_chart(measured["trainings"]),
            width=None,
        ),
        Figure(
            "losses",
            "The loss against the learning rate, a line a width",
            "Loss after training over the loss before, geometric means over networks; cut at 3. "
            "The faster a best rate falls with the width, the further apart are the valleys.",
            losses_chart(measured["curves"]),
            width=None,
        ),
    ]


def widths_chart(trainings: pd.DataFrame) -> alt.VConcatChart:
    """A row per network, a column per kind of rate."""
    keys = ["network", "kind", "start"]
    long = trainings.melt(
        ["network", "start", "width"], ["best", "stable"], var_name="kind", value_name="rate"
    )
    long["log"] = np.log(long["rate"])
    spread = long.groupby([*keys, "width"])["log"].agg(["mean", "min", "max"])
    spread = np.exp(spread).reset_index()
    narrowest = spread.sort_values("width").groupby(keys)[["mean", "width"]].transform("first")
    power = spread["start"].map(EXPECTED)
    spread["law"] = narrowest["mean"] * (spread["width"] / narrowest["width"]) ** power
    spread["start"] = spread["start"].map(STARTS)
    limits = [float(spread[["min", "law"]].min().min()), float(spread["max"].max())]
    rows = [
        alt.hconcat(
            *(
                width_panel(spread, network, kind, limits, labels=kind == "best")
                for kind in ("best", "stable")
            ),
            spacing=14,
        )
        for network in NETWORKS
    ]
    return alt.vconcat(*rows, spacing=22)


def width_panel(
    spread: pd.DataFrame, network: str, kind: str, limits: list[float], labels: bool
) -> alt.LayerChart:
    some = spread[(spread["network"] == network) & (spread["kind"] == kind)]
    scale = alt.Scale(type="log", domain=limits, nice=False)
    axis = alt.Axis(format="~e", values=RATES, labels=labels)

    def y(field: str, title: str | None = None) -> alt.Y:
        return alt.Y(f"{field}:Q", title=title, scale=scale, axis=axis)

    base = chart(some).encode(
        x=alt.X(
            "width:Q",
            title="width n",
            scale=alt.Scale(type="log", base=2),
            axis=alt.Axis(values=sorted(set(some["width"]))),
        ),
        color=color("start", list(STARTS.values()), legend(symbolOpacity=1)),
    )
    heading = alt.TitleParams(
        f"{QUANTITIES[kind]}, {network}",
        fontSize=12,
        fontWeight="normal",
        color=SOFT,
        anchor="middle",
    )
    return alt.layer(
        base.mark_line(strokeDash=[5, 4], opacity=0.6).encode(y=y("law")),
        base.mark_rule(opacity=0.5, strokeWidth=2).encode(y=y("min"), y2="max:Q"),
        base.mark_line(point=alt.OverlayMarkDef(size=45, filled=True)).encode(
            y=y("mean", "learning rate" if labels else None),
            tooltip=tips("start:N", "width:Q", mean=".2e"),
        ),
    ).properties(width=262, height=200, title=heading)


def losses_chart(curves: pd.DataFrame) -> alt.FacetChart:
    shown = curves.assign(loss=curves["loss"].clip(upper=3.0))
    means = geometric_means(shown, ["network", "start", "width", "rate"], ["loss"])
    means["start"] = means["start"].map(STARTS)
    return (
        chart(means)
        .mark_line(strokeWidth=1.6)
        .encode(
            x=alt.X(
                "rate:Q",
                title="learning rate",
                scale=alt.Scale(type="log", nice=False),
                axis=alt.Axis(format="~e", values=RATES),
            ),
            y=alt.Y(
                "loss:Q",
                title="loss, share of the start",
                scale=LOG,
                axis=alt.Axis(tickCount=4, format="~g"),
            ),
            color=alt.Color(
                "width:O", scale=alt.Scale(scheme="viridis"), legend=legend(title="width n")
            ),
            tooltip=tips("width:O", rate=".2e", loss=".3g"),
        )
        .properties(width=262, height=170)
        .facet(
            column=alt.Column("start:N", header=HEADER),
            row=alt.Row("network:N", sort=list(NETWORKS), header=HEADER),
        )
    )


def discuss(measured: Measurement) -> list[str]:
    """The laws of both networks, and the widths that follow them."""
    trainings = measured["trainings"]
    exponents = fit_all(trainings)
    best = {case: exponents[*case, "best"] for case in ALGEBRA}
    signs = ""
    if best["square", "A"].high < EXPECTED["A"]:
        signs = (
            " B moves along the readout’s own signs there, which lets Init[A]’s rate fall faster."
        )
    narrow = ""
    if all(fit.below_zero for fit in best.values()):
        narrow = (
            "A rate found on a narrow model is too large for a wide one, and by how much depends "
            "on the start. "
        )
    return [
        "The paper’s laws are about the features s B A h behind the adapted layer, which the loss "
        f"of the narrow network sees as they are. Its best rates go as n^{best['narrow', 'A']} "
        f"under Init[A] and n^{best['narrow', 'B']} under Init[B]: "
        f"{laws_found(exponents, 'narrow')}. Where a readout of the same width follows, they go as "
        f"n^{best['square', 'A']} and n^{best['square', 'B']}: {laws_found(exponents, 'square')}."
        f"{signs}",
        *(widths_ahead(trainings, network) for network in NETWORKS),
        f"{narrow}Not measured: trained weights, whose spectra are not flat, more than one adapted "
        "layer, and the effect of alpha.",
    ]


def laws_found(exponents: Exponents, network: str) -> str:
    """The starts for which the claim on the rates holds."""
    near = [f"Init[{start}]’s" for start in EXPECTED if law_holds(exponents, network, start)]
    if len(near) == len(EXPECTED):
        return "both laws are found"
    return f"{near[0]} law alone is found" if near else "neither law is found"


def widths_ahead(trainings: pd.DataFrame, network: str) -> str:
    """The widths at which Init[A] has the larger stable rate."""
    found = ratios(trainings[trainings["network"] == network], "stable", "width")
    means = np.exp(np.log(found).groupby("width").mean())
    behind = [f"{width} ({ratio:.2f} times)" for width, ratio in means.items() if ratio <= 1]
    return (
        f"In the {network} network Init[A]’s largest stable rate is above Init[B]’s at "
        f"{len(means) - len(behind)} of {len(means)} widths"
        + (f"; not at n = {', '.join(behind)}." if behind else ".")
    )


REPRODUCTION = Reproduction(
    name="rate_scaling",
    title="Init[A] and Init[B]: learning rates over the width",
    source="Hayou, Ghosh & Yu 2024, arXiv 2406.08447, section 3",
    question="Does the largest useful learning rate fall as n^(-1/2) where A starts at random, and "
    "as n^(-1) where B does?",
    options=RateScalingOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
    discuss=discuss,
)

if __name__ == "__main__":
    run(REPRODUCTION)
