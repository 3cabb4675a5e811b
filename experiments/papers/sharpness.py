"""Sharpness: the largest curvature of the loss at each method's start, and its best learning rate.

Gradient descent on a quadratic of curvature λ diverges above the rate 2 / λ: of two starts that
compute the same function, the sharper one needs the smaller rate. The paper measures the largest
eigenvalue of the Hessian with respect to the adapter's parameters and explains tuned rates by it:
it is largest for OLoRA and LoRA-GA, then PiSSA's, then MiLoRA's and Init[AB]'s.

With B = 0 the loss is not a quadratic bowl: ∂²L/∂A² = 0, and the Hessian is (0, C; Cᵀ, H_BB), a
saddle whose cross term C carries the gradient of the product. So λmin is reported as well.

Adam does not step along the gradient. Its first step is η in the direction of the gradient's signs
d, in which a quadratic model's loss falls by η ‖g‖₁ - η² dᵀ H d / 2: most, on average over batches,
at η = E‖g‖₁ / E[dᵀ H d], "Adam's first step" in the tables. (Adam's edge of stability is about the
Hessian preconditioned by the second moment, which is zero for A where B = 0.)

The paper's ratios are those of pretrained language models with trained heads, so a trained head
decides them here. The tuned rates come from sweeps that begin with a new head, so they are compared
with the curvature there.

Source: Lee, Ko, Chen & Yeh 2026, "Learning Rate Matters: Vanilla LoRA May Suffice for LLM
Fine-tuning", arXiv 2602.04998, the analysis of the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import altair as alt
import numpy as np
import pandas as pd
from scipy.stats import permutation_test, rankdata

from .application import run
from .claim import Claim, Verdict, judge
from .drawing import LOG, color, methods_color, ordered, plot
from .interval import Interval, fit_exponent, geometric_mean
from .reproduction import Figure, Measurement, Reproduction, Table
from .sharpness_rows import BASELINE, NEW, TRAINED, SharpnessOptions, measure

ABOVE = "above LoRA’s beyond their 95 % intervals"
RESAMPLES = 50_000  # all orders of eight methods are 40,320: the p-value is exact up to there


@dataclass(frozen=True)
class Correlation:
    """Spearman's coefficient with its p-value (two-sided, by permutations), and a power law."""

    coefficient: float
    p_value: float
    exponent: Interval
    methods: int


def ratios(rows: pd.DataFrame, head: str, quantity: str = "largest") -> dict[str, Interval]:
    """By method, the ratio to kaiming's value on the same batch: geometric means over the batches.

    Methods without a positive value on some batch are left out, because a logarithm needs one.
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
    """By method, the rate at which a quadratic model's loss falls most in Adam's first step.

    Methods whose loss bends downwards, on average over the batches, are left out.
    """
    means = rows[rows["head"] == head].groupby("method", sort=False)[["slope", "bend"]].mean()
    means = means[means["bend"] > 0]
    return {str(name): float(rate) for name, rate in (means["slope"] / means["bend"]).items()}


def correlate(values: Mapping[str, float], rates: Mapping[str, float]) -> Correlation | None:
    """Correlate a quantity with the best rates, over methods that have both; None below four."""
    methods = [name for name in rates if name in values]
    x, y = [values[name] for name in methods], [rates[name] for name in methods]
    if len(methods) < 4 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    first, second = rankdata(x), rankdata(y)

    def agreement(order: np.ndarray, axis: int = -1) -> np.ndarray:
        return (order * second).sum(axis=axis)

    # With one side fixed, Spearman's coefficient is linear in the sum of products of ranks.
    tested = permutation_test(
        (first,),
        agreement,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    coefficient = float(np.corrcoef(first, second)[0, 1])
    return Correlation(coefficient, float(tested.pvalue), fit_exponent(x, y), len(methods))


def best_rates(measured: Measurement) -> dict[str, float]:
    """The known best rate of each method."""
    return dict(zip(measured["rates"]["method"], measured["rates"]["rate"], strict=True))


def judge_all(measured: Measurement) -> list[Claim]:
    """Three claims on ratios, if their methods were measured, and one on tuned rates."""
    rows, rates = measured["starts"], best_rates(measured)
    new, trained = ratios(rows, NEW), ratios(rows, TRAINED)
    judged = (claim(trained, new) for claim in (sharpest_claim, pissa_claim, mild_claim))
    return [
        *(claim for claim in judged if claim is not None),
        correlation_claim(new, rates, first_steps(rows, NEW)),
    ]


def show(found: Mapping[str, Interval], methods: list[str]) -> str:
    """`olora 3.2 [2.9, 3.6], pissa 1.1 [1, 1.2]`."""
    return ", ".join(f"{name} {found[name].show('.3g')}" for name in methods if name in found)


def ratio_claim(
    statement: str,
    paper: str,
    criterion: str,
    trained: Mapping[str, Interval],
    new: Mapping[str, Interval],
    methods: list[str],
    holds: Callable[[Interval], bool],
    shown: Sequence[str] = (),
) -> Claim:
    """A claim on λmax over LoRA's, of some methods under a trained head.

    Args:
        holds: whether the ratio of one method, which is above 1, meets the whole criterion.
        shown: more methods to show.
    """
    chosen = [trained[name] for name in methods]
    again = show(new, methods)
    return Claim(
        statement=f"{statement} (λmax of the Hessian)",
        paper=f"λmax {paper} times LoRA’s, Qwen3-0.6B",
        ours=f"λmax over LoRA’s, trained head: {show(trained, [*methods, *shown])}",
        criterion=criterion,
        verdict=judge(
            holds=all(ratio.low > 1 and holds(ratio) for ratio in chosen),
            direction=all(ratio.low > 1 for ratio in chosen),
            opposite=all(ratio.high < 1 for ratio in chosen),
        ),
        remark=f"Under a new head, as sweeps begin: {again}." if again else "",
    )


def sharpest_claim(trained: Mapping[str, Interval], new: Mapping[str, Interval]) -> Claim | None:
    """OLoRA and LoRA-GA."""
    methods, others = ["olora", "lora_ga"], ["pissa", "milora", "init_ab"]
    others = [name for name in others if name in trained]
    if not set(methods) <= set(trained) or not others:
        return None
    most = max(trained[name].value for name in others)
    return ratio_claim(
        "OLoRA and LoRA-GA start the sharpest, far sharper than LoRA",
        "up to 100",
        f"under a trained head both at least 10 times LoRA’s, {ABOVE}, and above "
        f"{', '.join(others)}; same direction: both {ABOVE}; contradicts: both below LoRA’s beyond "
        "their intervals",
        trained,
        new,
        methods,
        lambda ratio: ratio.value >= 10 and ratio.value > most,
        others,
    )


def pissa_claim(trained: Mapping[str, Interval], new: Mapping[str, Interval]) -> Claim | None:
    """PiSSA."""
    if "pissa" not in trained:
        return None
    return ratio_claim(
        "PiSSA starts about ten times as sharp as LoRA",
        "about 10",
        "under a trained head between 5 and 20 times LoRA’s, and above it beyond the 95 % "
        "interval; same direction: above it beyond the interval; contradicts: below it beyond the "
        "interval",
        trained,
        new,
        ["pissa"],
        lambda ratio: 5 <= ratio.value <= 20,
    )


def mild_claim(trained: Mapping[str, Interval], new: Mapping[str, Interval]) -> Claim | None:
    """MiLoRA and Init[AB]."""
    methods = ["milora", "init_ab"]
    if not set(methods) <= set(trained):
        return None
    return ratio_claim(
        "MiLoRA and Init[AB] start about twice as sharp as LoRA",
        "about 2",
        f"under a trained head both between 1.2 and 4 times LoRA’s, {ABOVE}; same direction: both "
        f"{ABOVE}; contradicts: both below LoRA’s beyond their intervals",
        trained,
        new,
        methods,
        lambda ratio: 1.2 <= ratio.value <= 4,
    )


def correlation_claim(
    new: Mapping[str, Interval], rates: Mapping[str, float], steps: Mapping[str, float]
) -> Claim:
    """The correlation of sharpness and tuned rates."""
    found = correlate({name: ratio.value for name, ratio in new.items()}, rates)
    statement = "The sharper the start, the smaller the learning rate that suits it"
    paper = (
        "tuned rates fall as λmax rises: OLoRA’s and LoRA-GA’s 18, PiSSA’s about 10, MiLoRA’s "
        "3.2 and Init[AB]’s 1.8 times below LoRA’s"
    )
    criterion = (
        "Spearman’s coefficient of best rate and λmax under a new head, as the sweeps "
        "began, is negative with p < 0.05; same direction: negative; contradicts: positive "
        "with p < 0.05"
    )
    if found is None:
        return Claim(
            statement,
            paper,
            f"{len(rates)} methods with a known best rate",
            criterion,
            Verdict.NOT_JUDGED,
            "Fewer than four methods, or all rates alike.",
        )
    unknown = ", ".join(name for name in new if name not in rates)
    without = f"Of {unknown} no best rate is known: the coefficient is without them."
    without = without if unknown else ""
    return Claim(
        statement=statement,
        paper=paper,
        ours=f"coefficient {found.coefficient:.2f}, p = {found.p_value:.3g}, "
        f"{found.methods} methods; best rate ∝ λmax^{found.exponent} (−1 for gradient descent)",
        criterion=criterion,
        verdict=judge(
            holds=found.coefficient < 0 and found.p_value < 0.05,
            direction=found.coefficient < 0,
            opposite=found.coefficient > 0 and found.p_value < 0.05,
        ),
        remark=" ".join(filter(None, (without, adam_remark(steps, rates)))),
    )


def adam_remark(steps: Mapping[str, float], rates: Mapping[str, float]) -> str:
    """The correlation of the tuned rates with Adam's first step."""
    adam = correlate(steps, rates)
    if adam is None:
        return ""
    return (
        "The rates are Adam’s, whose first step follows the signs of the gradient: the rate that "
        "a quadratic model likes best for it, ‖g‖₁ / dᵀHd, goes with the tuned rates at a "
        f"coefficient of {adam.coefficient:.2f} (p = {adam.p_value:.2g}, {adam.methods} methods)."
    )


def tabulate(measured: Measurement) -> list[Table]:
    """Curvatures by method and head."""
    rows, rates = measured["starts"], best_rates(measured)
    parts = []
    for head in (TRAINED, NEW):
        some = rows[rows["head"] == head]
        of = ["largest", "smallest", "gradient"]
        frame = some.groupby(["head", "method"], sort=False)[of].mean().reset_index()
        found = {name: ratio.show(".3g") for name, ratio in ratios(rows, head).items()}
        frame["λmax over LoRA’s"] = frame["method"].map(found)
        frame["Adam’s first step"] = frame["method"].map(first_steps(rows, head))
        parts.append(frame)
    frame = pd.concat(parts, ignore_index=True)
    frame["best rate"] = frame["method"].map(rates)
    return [
        Table(
            "sharpness",
            "Curvature at the start, means over batches",
            frame.dropna(axis="columns", how="all"),
            {"best rate": ".2g", "Adam’s first step": ".2g"},
            "largest and smallest: λmax and λmin. λmax over LoRA’s: geometric means over batches "
            "with 95 % intervals. The paper’s multiples (Qwen3-0.6B): OLoRA and LoRA-GA up to 100, "
            "PiSSA 10, MiLoRA and Init[AB] 2. Adam’s first step: the rate that a quadratic model "
            "likes best for it. Best rate: of a sweep.",
        ),
    ]


def draw(measured: Measurement) -> list[Figure]:
    """Ratios by method; best rates over curvature if two or more are known."""
    rows, rates = measured["starts"], best_rates(measured)
    shown = pd.DataFrame(
        {"method": name, "head": head, "ratio": ratio.value, "low": ratio.low, "high": ratio.high}
        for head in (TRAINED, NEW)
        for name, ratio in ratios(rows, head).items()
    )
    x = alt.X("ratio:Q", title="λmax / λmax of kaiming", scale=LOG)
    order = shown.sort_values("ratio", ascending=False)["method"].unique().tolist()
    drawn = [
        Figure(
            "ratios",
            "Sharpness at the start, over LoRA’s",
            "λmax of the Hessian with respect to the adapter, geometric means over batches with "
            "95 % intervals, under a head that was trained first and under a new one.",
            plot(
                shown,
                "point",
                x,
                alt.Y("method:N", sort=order, title=None),
                color=color("head", [TRAINED, NEW]),
                interval=("low", "high"),
                level=1,
                height=alt.Step(24),
            ),
        )
    ]
    tuned = shown[(shown["head"] == NEW) & shown["method"].isin(list(rates))]
    if len(tuned) >= 2:
        drawn.append(
            Figure(
                "rates",
                "The best learning rate against curvature under the new head",
                "Gradient descent would want a rate in proportion to 1 / λmax.",
                plot(
                    tuned.assign(rate=tuned["method"].map(rates)),
                    "point",
                    x,
                    alt.Y("rate:Q", title="best learning rate", scale=LOG),
                    color=methods_color(ordered(set(tuned["method"]))),
                ),
            )
        )
    return drawn


REPRODUCTION = Reproduction(
    name="sharpness",
    title="Sharpness at the start, and the learning rate",
    source="Lee, Ko, Chen & Yeh 2026, arXiv 2602.04998, the analysis of the Hessian",
    question="Does the largest eigenvalue of the Hessian at the start explain why methods want "
    "different learning rates?",
    options=SharpnessOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
)

if __name__ == "__main__":
    run(REPRODUCTION)
