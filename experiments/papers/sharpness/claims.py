"""Ratios to LoRA's sharpness, their correlation with tuned rates, and what follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import permutation_test, rankdata, t

from experiments.papers.fitting import PowerLaw, fit_power_law
from experiments.papers.verdicts import Claim, Verdict, judge

BASELINE = "kaiming"
# λmax over LoRA's on Qwen3-0.6B: about, or (OLoRA, LoRA-GA) up to.
PAPER = {"olora": 100.0, "lora_ga": 100.0, "pissa": 10.0, "milora": 2.0, "init_ab": 2.0}
RESAMPLES = 50_000  # all orders of eight methods are 40,320: the p-value is exact up to there


@dataclass(frozen=True)
class Ratio:
    """A geometric mean over batches with its 95 % interval; equal ends where there is one batch."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Correlation:
    """Spearman's, with its p-value (two-sided, by permutations), and a power law of the rates."""

    coefficient: float
    p_value: float
    law: PowerLaw
    methods: int


def ratios(rows: pd.DataFrame, head: str, quantity: str = "largest") -> dict[str, Ratio]:
    """By method, over kaiming's on the same batch. Methods without a positive value on some batch
    are left out: their logarithm is not defined.
    """
    table = rows[rows["head"] == head].pivot_table(
        index="batch", columns="method", values=quantity, sort=False
    )
    found = {}
    for method in table:
        shares = (table[method] / table[BASELINE]).to_numpy()
        if not (np.isfinite(shares).all() and (shares > 0).all()):
            continue
        logs = np.log(shares)
        margin = 0.0
        if len(logs) > 1:
            margin = t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
        middle = logs.mean()
        found[str(method)] = Ratio(*(float(np.exp(middle + x)) for x in (0.0, -margin, margin)))
    return found


def first_steps(rows: pd.DataFrame, head: str) -> dict[str, float]:
    """By method, the rate at which a quadratic model's loss falls most in Adam's first step, on
    average over the batches. Methods whose loss bends downwards on average are left out.
    """
    means = rows[rows["head"] == head].groupby("method", sort=False)[["slope", "bend"]].mean()
    means = means[means["bend"] > 0]
    return {str(name): float(rate) for name, rate in (means["slope"] / means["bend"]).items()}


def correlate(values: Mapping[str, float], rates: Mapping[str, float]) -> Correlation | None:
    """Of a quantity with the best rates over the methods that have both; None below four."""
    methods = [name for name in rates if name in values]
    x, y = [values[name] for name in methods], [rates[name] for name in methods]
    if len(methods) < 4 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    first, second = rankdata(x), rankdata(y)

    def agreement(order: np.ndarray, axis: int = -1) -> np.ndarray:
        return (order * second).sum(axis=axis)

    # With one side fixed, Spearman's coefficient is linear in the sum of products of ranks.
    tested = permutation_test(
        (first,), agreement, permutation_type="pairings", vectorized=True, n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    coefficient = float(np.corrcoef(first, second)[0, 1])
    return Correlation(coefficient, float(tested.pvalue), fit_power_law(x, y), len(methods))


def claims(rows: pd.DataFrame, rates: Mapping[str, float]) -> list[Claim]:
    found, trained = ratios(rows, "new"), ratios(rows, "trained")
    judged = (claim(found, trained) for claim in (sharpest_claim, pissa_claim, mild_claim))
    return [
        *(claim for claim in judged if claim is not None),
        correlation_claim(found, rates, first_steps(rows, "new")),
    ]


def head_remark(methods: list[str], trained: Mapping[str, Ratio]) -> str:
    """The ratios under a trained head, which a pretrained language model has from the beginning."""
    known = [name for name in methods if name in trained]
    if not known:
        return ""
    return (
        f"With the head trained first: {told(trained, known)}. Under a new head, small and random, "
        "λmin is about −λmax at LoRA’s start: there λmax is the cross term of A and B rather than "
        "the curvature along either."
    )


def told(found: Mapping[str, Ratio], methods: list[str]) -> str:
    return ", ".join(f"{name} {found[name]}" for name in methods)


def sharpest_claim(found: Mapping[str, Ratio], trained: Mapping[str, Ratio]) -> Claim | None:
    methods = [name for name in ("olora", "lora_ga") if name in found]
    others = [r.value for name, r in found.items() if name in ("pissa", "milora", "init_ab")]
    if len(methods) < 2 or not others:
        return None
    chosen = [found[name] for name in methods]
    return Claim(
        statement="OLoRA and LoRA-GA start the sharpest, far sharper than LoRA",
        paper="λmax up to 100 times LoRA’s, Qwen3-0.6B",
        ours=f"λmax over LoRA’s: {told(found, methods)}",
        criterion="both at least 10 times LoRA’s, and above PiSSA, MiLoRA and Init[AB]; same "
        "direction: both above LoRA’s beyond their intervals",
        verdict=judge(
            holds=all(r.value >= 10 and r.value > max(others) for r in chosen),
            direction=all(r.low > 1 for r in chosen),
            opposite=all(r.high < 1 for r in chosen),
        ),
        remark=head_remark(methods, trained),
    )


def pissa_claim(found: Mapping[str, Ratio], trained: Mapping[str, Ratio]) -> Claim | None:
    if "pissa" not in found:
        return None
    ratio = found["pissa"]
    return Claim(
        statement="PiSSA starts about ten times as sharp as LoRA",
        paper="λmax about 10 times LoRA’s, Qwen3-0.6B",
        ours=f"λmax over LoRA’s: {ratio}",
        criterion="between 5 and 20 times LoRA’s; same direction: above LoRA’s beyond the interval",
        verdict=judge(
            holds=5 <= ratio.value <= 20, direction=ratio.low > 1, opposite=ratio.high < 1
        ),
        remark=head_remark(["pissa"], trained),
    )


def mild_claim(found: Mapping[str, Ratio], trained: Mapping[str, Ratio]) -> Claim | None:
    methods = [name for name in ("milora", "init_ab") if name in found]
    if len(methods) < 2:
        return None
    chosen = [found[name] for name in methods]
    return Claim(
        statement="MiLoRA and Init[AB] start about twice as sharp as LoRA",
        paper="λmax about 2 times LoRA’s, Qwen3-0.6B",
        ours=f"λmax over LoRA’s: {told(found, methods)}",
        criterion="both between 1.2 and 4 times LoRA’s; same direction: both above LoRA’s",
        verdict=judge(
            holds=all(1.2 <= r.value <= 4 for r in chosen),
            direction=all(r.value > 1 for r in chosen),
            opposite=all(r.high < 1 for r in chosen),
        ),
        remark=head_remark(methods, trained),
    )


def correlation_claim(
    found: Mapping[str, Ratio], rates: Mapping[str, float], steps: Mapping[str, float]
) -> Claim:
    found_one = correlate({name: ratio.value for name, ratio in found.items()}, rates)
    statement = "The sharper the start, the smaller the learning rate that suits it"
    paper = "tuned rates fall as λmax rises: OLoRA’s and LoRA-GA’s 18, PiSSA’s about 10, MiLoRA’s "
    paper += "3.2 and Init[AB]’s 1.8 times below LoRA’s"
    criterion = "Spearman’s coefficient of λmax and best rate is negative with p < 0.05; same "
    criterion += "direction: negative"
    if found_one is None:
        return Claim(
            statement, paper, f"{len(rates)} methods with a known best rate", criterion,
            Verdict.NOT_JUDGED, "Fewer than four methods, or all rates alike.",
        )  # fmt: skip
    return Claim(
        statement=statement,
        paper=paper,
        ours=f"coefficient {found_one.coefficient:.2f}, p = {found_one.p_value:.3g}, "
        f"{found_one.methods} methods; best rate ∝ λmax^{found_one.law} (−1 for gradient descent)",
        criterion=criterion,
        verdict=judge(
            holds=found_one.coefficient < 0 and found_one.p_value < 0.05,
            direction=found_one.coefficient < 0,
            opposite=found_one.coefficient > 0 and found_one.p_value < 0.05,
        ),
        remark=adam_remark(steps, rates),
    )


def adam_remark(steps: Mapping[str, float], rates: Mapping[str, float]) -> str:
    adam = correlate(steps, rates)
    if adam is None:
        return ""
    return (
        "The rates are Adam’s, whose first step follows the signs of the gradient: the rate that "
        "a quadratic model likes best for it, ‖g‖₁ / dᵀHd, goes with the tuned rates at a "
        f"coefficient of {adam.coefficient:.2f} (p = {adam.p_value:.2g}, {adam.methods} methods)."
    )


def discussion(
    rows: pd.DataFrame, rates: Mapping[str, float], heads: Mapping[str, float]
) -> list[str]:
    """What the figures say beyond the claims; every number is measured here."""
    sentences = [
        "The largest eigenvalue bounds the rate of plain gradient descent, which moves along the "
        "gradient; Adam moves every entry by about the rate, however small its gradient, so that "
        "what bounds its rate is the curvature along signs. The tables hold both."
    ]
    for head in heads:
        steps = first_steps(rows, head)
        adam = correlate(steps, rates)
        if adam is not None:
            missing = [name for name in rates if name not in steps]
            sentences.append(
                f"Adam’s first step, {head} head: the rate that a quadratic model likes best and "
                f"the tuned rates have a coefficient of {adam.coefficient:.2f} "
                f"(p = {adam.p_value:.2g}, {adam.methods} methods), tuned ∝ its power {adam.law}."
                + (f" Left out, as their loss bends downwards there: {', '.join(missing)}."
                   if missing else "")
            )  # fmt: skip
    if "trained" in heads:
        before, after = ratios(rows, "new"), ratios(rows, "trained")
        shared = [name for name in before if name in after and name != BASELINE]
        again = correlate({name: after[name].value for name in after}, rates)
        words = ", ".join(f"{n} {before[n].value:.2g} → {after[n].value:.2g}" for n in shared)
        sentences.append(
            "A new head is small and random, and every curvature below it is scaled by it. With "
            f"the head trained first, the ratios to LoRA go: {words}"
            + (f"; the coefficient is then {again.coefficient:.2f}." if again else ".")
        )
    sentences.append(
        "The head’s own largest eigenvalue: "
        + ", ".join(f"{value:.3g} ({name} head)" for name, value in heads.items())
        + ". It belongs to no method, and its rate is the same for all in the sweeps."
    )
    return sentences
