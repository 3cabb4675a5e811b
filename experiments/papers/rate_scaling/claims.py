"""What was claimed, and what the exponents say to it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.papers.claim import Claim, judge
from experiments.papers.fitting import PowerLaw, fit_power_law
from experiments.papers.interval import geometric_mean
from experiments.papers.rate_scaling.networks import NETWORKS

EXPECTED = {"A": -0.5, "B": -1.0}
OTHER = {"A": EXPECTED["B"], "B": EXPECTED["A"]}
TOLERANCE = 0.15
DESCRIBED = {
    "square": "in a square network, with a readout behind the adapter",
    "narrow": "in a narrow network, with nothing growing behind the adapter",
}
POWERS = {-0.5: "n^(-1/2)", -1.0: "n^(-1)"}
READOUT = -0.75  # what the square network's readout makes of Init[A]'s law
Exponents = dict[tuple[str, str, str], PowerLaw]


def claims(trainings: pd.DataFrame, compared: pd.DataFrame, exponents: Exponents) -> list[Claim]:
    return [
        *(scaling_claim(exponents, network, start) for network in NETWORKS for start in EXPECTED),
        tolerance_claim(trainings),
        loss_claim(compared),
        instability_claim(exponents),
    ]


def scaling_claim(exponents: Exponents, network: str, start: str) -> Claim:
    """The exponents of the best and of the largest stable rate."""
    fits = [exponents[network, start, quantity] for quantity in ("best", "stable")]
    expected, other = EXPECTED[start], OTHER[start]
    holds = law_holds(exponents, network, start)
    nearer = all(abs(fit.exponent - expected) < abs(fit.exponent - other) for fit in fits)
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
    """Both exponents are near the start's own law, and their intervals exclude the other's."""
    return all(
        abs(fit.exponent - EXPECTED[start]) <= TOLERANCE and not fit.contains(OTHER[start])
        for fit in (exponents[network, start, quantity] for quantity in ("best", "stable"))
    )


def readout_remark(exponents: Exponents, network: str, start: str) -> str:
    """Why Init[A]'s law may be another behind a readout, where the measured exponent is that."""
    best, projected, features = (
        exponents[network, start, name] for name in ("best", "projected", "features")
    )
    if (network, start) != ("square", "A") or abs(best.exponent - READOUT) > TOLERANCE:
        return ""
    return (
        "A readout with n entries of 1/√n behind the adapter adds up what B learns along their "
        "signs, so the loss binds the rate before the features do: η² n · √n ≤ 1 gives −3/4, with "
        f"A h growing as n^(1/4) (measured: n^{projected.exponent:.2f}) and s B A h falling as "
        f"n^(−1/2) (measured: n^{features.exponent:.2f}); the narrow network, where that sum is "
        "absent, is the check."
    )


def ratios(trainings: pd.DataFrame, quantity: str, by: str) -> pd.Series:
    """Init[A] over Init[B] on the same network, by width or rank, and seed."""
    table = trainings.pivot_table(index=[by, "seed"], columns="start", values=quantity)
    return table["A"] / table["B"]


def tolerance_claim(trainings: pd.DataFrame) -> Claim:
    """The largest stable rates, Init[A]'s over Init[B]'s."""
    told, larger, grows = [], [], []
    for network in NETWORKS:
        found = ratios(trainings[trainings["network"] == network], "stable", "width")
        means = np.exp(np.log(found).groupby("width").mean())
        fit = fit_power_law(found.index.get_level_values("width").tolist(), found.tolist())
        told.append(f"{network}: {means.iloc[0]:.2g} → {means.iloc[-1]:.2g}, ∝ n^{fit}")
        larger.append(bool((means > 1).all()))
        grows.append(fit)
    widths = sorted(trainings["width"].unique())
    return Claim(
        statement="Init[A] stands a larger learning rate than Init[B], the more so the wider the "
        "network",
        paper="the ratio grows as n^(1/2)",
        ours=f"largest stable rates, Init[A] over Init[B], n = {widths[0]} → {widths[-1]}: "
        + "; ".join(told),
        criterion="in both networks the ratio is above 1 at every width and its exponent is above "
        "0 beyond its interval; same direction: both exponents above 0; contradicts: both below 0 "
        "beyond their intervals",
        verdict=judge(
            holds=all(larger) and all(fit.low > 0 for fit in grows),
            direction=all(fit.exponent > 0 for fit in grows),
            opposite=all(fit.high < 0 for fit in grows),
        ),
    )


def loss_claim(compared: pd.DataFrame) -> Claim:
    """The loss at each start's own best rate, by rank."""
    found = {
        rank: geometric_mean(some.to_numpy())
        for rank, some in ratios(compared, "loss", "rank").groupby("rank")
    }
    told = [f"r = {rank}: {ratio.show('.2f')}" for rank, ratio in found.items()]
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
        + ", ".join(told),
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
    )  # fmt: skip


def instability_claim(exponents: Exponents) -> Claim:
    """How A h grows at the best rate."""
    told, grows, bounded = [], [], []
    for network in NETWORKS:
        first, second = (exponents[network, start, "projected"] for start in ("A", "B"))
        told.append(f"{network}: n^{first} against n^{second}")
        grows.append(first.low > 0)
        bounded.append(abs(second.exponent) <= TOLERANCE)
    ahead = [
        exponents[network, "A", "projected"].exponent
        > exponents[network, "B", "projected"].exponent
        for network in NETWORKS
    ]
    return Claim(
        statement="Init[A] pays with an internal instability: what A makes of its input, A h, "
        "grows with the width; under Init[B] it does not",
        paper="n^(1/2) against n^0, by the algebra",
        ours=f"A h at the best rate, Init[A] against Init[B]: {'; '.join(told)}",
        criterion="in both networks Init[A]’s exponent is above 0 beyond its interval and Init[B]’s"
        f" within {TOLERANCE} of 0; same direction: Init[A]’s exponent is the larger in both; "
        "contradicts: it is the larger in neither",
        verdict=judge(
            holds=all(grows) and all(bounded),
            direction=all(ahead),
            opposite=not any(ahead),
        ),
    )


def discussion(trainings: pd.DataFrame, exponents: Exponents) -> list[str]:
    """What the exponents come to; the sentences depend on them."""
    best = {
        (network, start): exponents[network, start, "best"]
        for network in NETWORKS
        for start in EXPECTED
    }
    return [
        "The paper’s laws are about the features s B A h behind the adapted layer, which the loss "
        f"of the narrow network sees as they are. Its best rates go as n^{best['narrow', 'A']} "
        f"under Init[A] and n^{best['narrow', 'B']} under Init[B]: "
        f"{laws_found(exponents, 'narrow')}. Where a readout of the same width follows, they go as "
        f"n^{best['square', 'A']} and n^{best['square', 'B']}: {laws_found(exponents, 'square')}."
        + (
            " B moves along the readout’s own signs there, which lets Init[A]’s rate fall faster."
            if best["square", "A"].high < EXPECTED["A"]
            else ""
        ),
        *(widths_ahead(trainings, network) for network in NETWORKS),
        (
            "A rate found on a narrow model is too large for a wide one, and by how much depends "
            "on the start. "
            if all(fit.high < 0 for fit in best.values())
            else ""
        )
        + "Not measured: trained weights, whose spectra are not flat, more than one adapted layer, "
        "and the effect of alpha.",
    ]


def laws_found(exponents: Exponents, network: str) -> str:
    """For which starts the claim on the rates holds."""
    near = [f"Init[{start}]’s" for start in EXPECTED if law_holds(exponents, network, start)]
    if len(near) == len(EXPECTED):
        return "both laws are found"
    return f"{near[0]} law alone is found" if near else "neither law is found"


def widths_ahead(trainings: pd.DataFrame, network: str) -> str:
    """At which widths Init[A] stands the larger rate."""
    found = ratios(trainings[trainings["network"] == network], "stable", "width")
    means = np.exp(np.log(found).groupby("width").mean())
    behind = [f"{width} ({ratio:.2f} times)" for width, ratio in means.items() if ratio <= 1]
    return (
        f"In the {network} network Init[A]’s largest stable rate is above Init[B]’s at "
        f"{len(means) - len(behind)} of {len(means)} widths"
        + (f"; not at n = {', '.join(behind)}." if behind else ".")
    )
