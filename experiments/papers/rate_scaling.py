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
from .drawing import BELOW, LOG, color, plot
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
            holds=all(
                abs(fit.value - expected) <= TOLERANCE and not fit.contains(other) for fit in fits
            ),
            direction=nearer and all(fit.high < 0 for fit in fits),
            opposite=all(fit.low > 0 for fit in fits),
        ),
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
            "measured": exponents[network, start, quantity].show(".2f"),
        }
        for (network, start), powers in ALGEBRA.items()
        for (quantity, name), algebra in zip(QUANTITIES.items(), powers, strict=True)
    ]
    return [
        Table(
            "exponents",
            "Exponents in the width n, with 95 % intervals",
            pd.DataFrame(rows),
            dict.fromkeys(("by the paper", "by the algebra"), ".2f"),
            "The algebra counts entries that move by the learning rate along the signs of the "
            "gradient; in the square network it adds the readout, which the paper’s does not.",
        ),
        Table(
            "rates",
            "Rates and sizes by width, geometric means over the networks",
            geometric_means(trainings, ["network", "start", "width"], [*QUANTITIES, "loss"]),
            {"width": ".0f"},
            "The loss is the mean of the last fifth of the steps over the loss before the first.",
        ),
        Table(
            "ranks",
            "Loss of the square network at each start’s best rate, by rank",
            geometric_means(measured["compared"], ["rank", "start"], ["loss"]),
            {"rank": ".0f"},
            "Geometric means over the networks.",
        ),
    ]


def geometric_means(rows: pd.DataFrame, keys: list[str], values: list[str]) -> pd.DataFrame:
    """Geometric means by some keys."""
    logs = rows.assign(**{name: np.log(rows[name]) for name in values})
    return np.exp(logs.groupby(keys, sort=False)[values].mean()).reset_index()


def draw(measured: Measurement) -> list[Figure]:
    """Rates over the width, and losses over the rates."""
    keys = ["network", "start", "width"]
    rates = geometric_means(measured["trainings"], keys, ["best", "stable"])
    rates = rates.melt(keys, var_name="kind", value_name="rate")
    rates = rates.assign(
        panel=rates["kind"].map(QUANTITIES) + ", " + rates["network"],
        start=rates["start"].map(STARTS),
    )
    curves = measured["curves"]
    losses = geometric_means(
        curves.assign(loss=curves["loss"].clip(upper=3.0)), [*keys, "rate"], ["loss"]
    )
    losses["panel"] = losses["start"].map(STARTS) + ", " + losses["network"]
    return [
        Figure(
            "widths",
            "Learning rates against the width",
            "Geometric means over networks; both axes are logarithmic.",
            plot(
                rates,
                "line",
                alt.X("width:Q", title="width n", scale=alt.Scale(type="log", base=2)),
                alt.Y("rate:Q", title="learning rate", scale=LOG, axis=alt.Axis(format="~e")),
                color=color("start", list(STARTS.values())),
                panel="panel",
            ),
            width=None,
        ),
        Figure(
            "losses",
            "The loss against the learning rate, by width",
            "Loss after training over the loss before, geometric means over networks; cut at 3. "
            "The faster a best rate falls with the width, the further apart are the valleys.",
            plot(
                losses,
                "line",
                alt.X("rate:Q", title="learning rate", scale=LOG, axis=alt.Axis(format="~e")),
                alt.Y("loss:Q", title="loss, share of the start", scale=LOG),
                color=alt.Color("width:O", scale=alt.Scale(scheme="viridis"), legend=BELOW),
                panel="panel",
            ),
            width=None,
        ),
    ]


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
)

if __name__ == "__main__":
    run(REPRODUCTION)
