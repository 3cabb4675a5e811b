"""Ratios to LoRA's sharpness, their correlation with tuned rates, and what follows.

Two heads, two questions. The paper's ratios are those of pretrained language models, whose head
was trained with the rest: they are judged under a trained head. The tuned rates are those of sweeps
that begin with a new head: they are held against the curvature there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import permutation_test, rankdata

from experiments.papers.claim import Claim, Verdict, judge
from experiments.papers.fitting import PowerLaw, fit_power_law
from experiments.papers.interval import Interval, geometric_mean

BASELINE = "kaiming"
# λmax over LoRA's on Qwen3-0.6B: about, or (OLoRA, LoRA-GA) up to.
PAPER = {"olora": 100.0, "lora_ga": 100.0, "pissa": 10.0, "milora": 2.0, "init_ab": 2.0}
ABOVE = "above LoRA’s beyond their 95 % intervals"
PAIRED = 0.1  # how near -1 the quotient of both ends is where they are a pair
RESAMPLES = 50_000  # all orders of eight methods are 40,320: the p-value is exact up to there


@dataclass(frozen=True)
class Correlation:
    """Spearman's, with its p-value (two-sided, by permutations), and a power law of the rates."""

    coefficient: float
    p_value: float
    law: PowerLaw
    methods: int


def ratios(rows: pd.DataFrame, head: str, quantity: str = "largest") -> dict[str, Interval]:
    """By method, over kaiming's on the same batch: geometric means over the batches. Methods
    without a positive value on some batch are left out: their logarithm is not defined.
    """
    table = rows[rows["head"] == head].pivot_table(
        index="batch", columns="method", values=quantity, sort=False
    )
    found = {}
    for method in table:
        shares = (table[method] / table[BASELINE]).to_numpy()
        if np.isfinite(shares).all() and (shares > 0).all():
            found[str(method)] = geometric_mean(shares)
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
    new, trained = ratios(rows, "new"), ratios(rows, "trained")
    judged = (claim(trained, new) for claim in (sharpest_claim, pissa_claim, mild_claim))
    return [
        *(claim for claim in judged if claim is not None),
        correlation_claim(new, rates, first_steps(rows, "new")),
    ]


def head_remark(methods: list[str], new: Mapping[str, Interval]) -> str:
    """The ratios under a new head, which sweeps of classifiers begin with."""
    known = [name for name in methods if name in new]
    if not known:
        return ""
    return f"Under a new head, as sweeps begin: {told(new, known)}."


def told(found: Mapping[str, Interval], methods: list[str]) -> str:
    return ", ".join(f"{name} {found[name].show('.3g')}" for name in methods)


def sharpest_claim(trained: Mapping[str, Interval], new: Mapping[str, Interval]) -> Claim | None:
    methods = [name for name in ("olora", "lora_ga") if name in trained]
    others = [name for name in ("pissa", "milora", "init_ab") if name in trained]
    if len(methods) < 2 or not others:
        return None
    chosen, next_ones = ([trained[name] for name in some] for some in (methods, others))
    most = max(ratio.value for ratio in next_ones)
    return Claim(
        statement="OLoRA and LoRA-GA start the sharpest, far sharper than LoRA (λmax of the "
        "Hessian)",
        paper="λmax up to 100 times LoRA’s, Qwen3-0.6B",
        ours=f"λmax over LoRA’s, trained head: {told(trained, [*methods, *others])}",
        criterion=f"under a trained head both at least 10 times LoRA’s, {ABOVE}, and above "
        f"{', '.join(others)}; same direction: both {ABOVE}; contradicts: both below LoRA’s beyond "
        "their intervals",
        verdict=judge(
            holds=all(r.value >= 10 and r.low > 1 and r.value > most for r in chosen),
            direction=all(r.low > 1 for r in chosen),
            opposite=all(r.high < 1 for r in chosen),
        ),
        remark=head_remark(methods, new),
    )


def pissa_claim(trained: Mapping[str, Interval], new: Mapping[str, Interval]) -> Claim | None:
    if "pissa" not in trained:
        return None
    ratio = trained["pissa"]
    return Claim(
        statement="PiSSA starts about ten times as sharp as LoRA (λmax of the Hessian)",
        paper="λmax about 10 times LoRA’s, Qwen3-0.6B",
        ours=f"λmax over LoRA’s, trained head: {ratio.show('.3g')}",
        criterion="under a trained head between 5 and 20 times LoRA’s, and above it beyond the "
        "95 % interval; same direction: above it beyond the interval; contradicts: below it beyond "
        "the interval",
        verdict=judge(
            holds=5 <= ratio.value <= 20 and ratio.low > 1,
            direction=ratio.low > 1,
            opposite=ratio.high < 1,
        ),
        remark=head_remark(["pissa"], new),
    )


def mild_claim(trained: Mapping[str, Interval], new: Mapping[str, Interval]) -> Claim | None:
    methods = [name for name in ("milora", "init_ab") if name in trained]
    if len(methods) < 2:
        return None
    chosen = [trained[name] for name in methods]
    return Claim(
        statement="MiLoRA and Init[AB] start about twice as sharp as LoRA (λmax of the Hessian)",
        paper="λmax about 2 times LoRA’s, Qwen3-0.6B",
        ours=f"λmax over LoRA’s, trained head: {told(trained, methods)}",
        criterion=f"under a trained head both between 1.2 and 4 times LoRA’s, {ABOVE}; same "
        f"direction: both {ABOVE}; contradicts: both below LoRA’s beyond their intervals",
        verdict=judge(
            holds=all(1.2 <= r.value <= 4 and r.low > 1 for r in chosen),
            direction=all(r.low > 1 for r in chosen),
            opposite=all(r.high < 1 for r in chosen),
        ),
        remark=head_remark(methods, new),
    )


def correlation_claim(
    new: Mapping[str, Interval], rates: Mapping[str, float], steps: Mapping[str, float]
) -> Claim:
    found_one = correlate({name: ratio.value for name, ratio in new.items()}, rates)
    statement = "The sharper the start, the smaller the learning rate that suits it"
    paper = "tuned rates fall as λmax rises: OLoRA’s and LoRA-GA’s 18, PiSSA’s about 10, MiLoRA’s "
    paper += "3.2 and Init[AB]’s 1.8 times below LoRA’s"
    criterion = "Spearman’s coefficient of best rate and λmax under a new head, as the sweeps "
    criterion += (
        "began, is negative with p < 0.05; same direction: negative; contradicts: positive "
    )
    criterion += "with p < 0.05"
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
        remark=" ".join(
            remark for remark in (unknown_remark(new, rates), adam_remark(steps, rates)) if remark
        ),
    )


def unknown_remark(new: Mapping[str, Interval], rates: Mapping[str, float]) -> str:
    """Methods that the correlation cannot speak of, those of the paper's own figures among them."""
    unknown = [name for name in new if name not in rates]
    if not unknown:
        return ""
    return f"Of {', '.join(unknown)} no best rate is known: the coefficient is without them."


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
    before, after = ratios(rows, "new"), ratios(rows, "trained")
    shared = [name for name in before if name in after and name != BASELINE]
    again = correlate({name: ratio.value for name, ratio in after.items()}, rates)
    words = ", ".join(f"{n} {before[n].value:.3g} → {after[n].value:.3g}" for n in shared)
    sentences.append(
        "A new head is small and random, and every curvature below it is scaled by it. From a new "
        f"head to a trained one the ratios to LoRA go: {words}"
        + (f"; the coefficient with the rates is then {again.coefficient:.2f}." if again else ".")
    )
    sentences.append(saddles(rows, list(heads)))
    sentences.append(
        "The head’s own largest eigenvalue: "
        + ", ".join(f"{value:.3g} ({name} head)" for name, value in heads.items())
        + ". It belongs to no method, and its rate is the same for all in the sweeps."
    )
    return sentences


def saddles(rows: pd.DataFrame, heads: list[str]) -> str:
    """How far LoRA's start is from a bowl: with ∂²L/∂A² = 0 the cross term of A and B alone has
    eigenvalues in pairs of ±σ.
    """
    base = rows[rows["method"] == BASELINE]
    shares = {}
    for head in heads:
        some = base[base["head"] == head]
        shares[head] = float((some["smallest"] / some["largest"]).mean())
    measured = ", ".join(f"{share:+.2f} ({head} head)" for head, share in shares.items())
    pairs = [head for head, share in shares.items() if abs(share + 1) < PAIRED]
    return f"At LoRA’s start λmin over λmax is {measured}." + (
        f" Near −1 ({' and '.join(pairs)} head) λmax is the cross term of A and B rather than the "
        "curvature along either."
        if pairs
        else ""
    )
