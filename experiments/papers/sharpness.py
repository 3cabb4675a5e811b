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

from collections.abc import Mapping
from dataclasses import dataclass

import altair as alt
import numpy as np
import pandas as pd
from scipy.stats import permutation_test, rankdata

from .application import run
from .claim import Claim, Verdict, judge
from .drawing import INK, chart, marks, methods_color, ordered, tips
from .interval import Interval, fit_exponent, geometric_mean
from .reproduction import Figure, Measurement, Reproduction, Table
from .sharpness_rows import BASELINE, NEW, TRAINED, SharpnessOptions, measure

# λmax over LoRA's on Qwen3-0.6B: about, or (OLoRA, LoRA-GA) up to.
PAPER = {"olora": 100.0, "lora_ga": 100.0, "pissa": 10.0, "milora": 2.0, "init_ab": 2.0}
ABOVE = "above LoRA’s beyond their 95 % intervals"
PAIRED = 0.1  # how near -1 the quotient of both ends must be to call them a pair
RESAMPLES = 50_000  # all orders of eight methods are 40,320: the p-value is exact up to there
GRAY = "#b9c0c8"


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


def head_remark(methods: list[str], new: Mapping[str, Interval]) -> str:
    """The ratios under a new head, which sweeps of classifiers begin with."""
    known = [name for name in methods if name in new]
    if not known:
        return ""
    return f"Under a new head, as sweeps begin: {show(new, known)}."


def show(found: Mapping[str, Interval], methods: list[str]) -> str:
    """`olora 3.2 [2.9, 3.6], pissa 1.1 [1, 1.2]`."""
    return ", ".join(f"{name} {found[name].show('.3g')}" for name in methods)


def sharpest_claim(trained: Mapping[str, Interval], new: Mapping[str, Interval]) -> Claim | None:
    """OLoRA and LoRA-GA."""
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
        ours=f"λmax over LoRA’s, trained head: {show(trained, [*methods, *others])}",
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
    """PiSSA."""
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
    """MiLoRA and Init[AB]."""
    methods = [name for name in ("milora", "init_ab") if name in trained]
    if len(methods) < 2:
        return None
    chosen = [trained[name] for name in methods]
    return Claim(
        statement="MiLoRA and Init[AB] start about twice as sharp as LoRA (λmax of the Hessian)",
        paper="λmax about 2 times LoRA’s, Qwen3-0.6B",
        ours=f"λmax over LoRA’s, trained head: {show(trained, methods)}",
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
    """Everything measured, a row per method."""
    rows, rates = measured["starts"], best_rates(measured)
    new, trained, steps = ratios(rows, NEW), ratios(rows, TRAINED), first_steps(rows, NEW)
    means = rows.groupby(["head", "method"])[["largest", "smallest", "gradient"]].mean()
    lines = []
    for method in ordered(set(rows["method"])):
        ratio = trained.get(method)
        here = means.loc[NEW, method]
        lines.append(
            {
                "method": method,
                "λmax, trained head": means.loc[(TRAINED, method), "largest"],
                "over LoRA": ratio.value if ratio else None,
                "low": ratio.low if ratio else None,
                "high": ratio.high if ratio else None,
                "paper": PAPER.get(method),
                "λmax, new head": here["largest"],
                "over LoRA, new head": new[method].value if method in new else None,
                "λmin": here["smallest"],
                "‖g‖": here["gradient"],
                "Adam’s first step": steps.get(method),
                "best rate": rates.get(method),
            }
        )
    table = Table(
        "sharpness",
        "Curvature at the start, means over batches",
        pd.DataFrame(lines).dropna(axis="columns", how="all"),
        {"best rate": ".2g", "Adam’s first step": ".2g", "paper": ".0f"},
        "λmax over LoRA’s: geometric means over batches with 95 % intervals, under a head that "
        "was trained first. λmin, ‖g‖ and what follows: under the new head. Adam’s first step: "
        "the rate that a quadratic model likes best for it; – where the loss bends downwards "
        "along the gradient’s signs, on average over the batches. Best rate: – where no sweep "
        "has tuned it.",
    )
    return [table]


def draw(measured: Measurement) -> list[Figure]:
    """Ratios by method; best rates over curvature if two or more are known."""
    rows, rates = measured["starts"], best_rates(measured)
    drawn = [
        Figure(
            "ratios",
            "Sharpness at the start, over LoRA’s",
            "λmax of the Hessian with respect to the adapter, geometric means over batches: "
            "discs with 95 % intervals under a head that was trained first, rings under a new one. "
            "Dark ticks: the paper’s multiples (Qwen3-0.6B; of OLoRA and LoRA-GA, “up to”).",
            ratios_chart(rows),
        )
    ]
    if len(rates) >= 2:
        drawn.append(
            Figure(
                "rates",
                "The best learning rate against curvature",
                "Left, λmax under the new head; dashed: a rate in proportion to 1 / λmax. Right, "
                "the rate that a quadratic model likes best for Adam’s first step; dashed: a rate "
                "in proportion to it. Both dashed lines go through kaiming.",
                rates_chart(rows, rates),
                width=None,
            )
        )
    return drawn


def ratios_chart(rows: pd.DataFrame) -> alt.LayerChart:
    new = ratios(rows, NEW)
    lines = [
        {
            "method": method,
            "ratio": ratio.value,
            "low": ratio.low,
            "high": ratio.high,
            "new": new[method].value if method in new else None,
            "paper": PAPER.get(method),
        }
        for method, ratio in ratios(rows, TRAINED).items()
    ]
    frame = pd.DataFrame(lines).sort_values("ratio", ascending=False)
    methods = frame["method"].tolist()
    # The interval of a few batches may span decades: it is cut off, so that the points stay apart.
    shown = pd.concat([frame["ratio"], *(frame[n].dropna() for n in ("paper", "new"))])
    domain = [min(0.5, shown.min() / 2), max(2.0, shown.max() * 2)]
    scale = alt.Scale(type="log", domain=domain, nice=False)
    ticks = [10.0**power for power in range(-2, 5) if domain[0] <= 10.0**power <= domain[1]]

    def x(field: str) -> alt.X:
        axis = alt.Axis(values=ticks, format="~g")
        return alt.X(f"{field}:Q", title="λmax / λmax of kaiming", scale=scale, axis=axis)

    formats = dict.fromkeys(("ratio", "low", "high", "new", "paper"), ".3g")
    place = {
        "y": alt.Y("method:N", sort=methods, title=None),
        "color": methods_color(methods, legend=False),
        "tooltip": tips("method:N", **formats),
    }
    base = chart(frame)
    layers = [
        chart(pd.DataFrame({"x": [1.0]})).mark_rule(color=GRAY).encode(x=x("x")),
        base.mark_rule(strokeWidth=3, opacity=0.55, clip=True).encode(
            **place, x=x("low"), x2="high:Q"
        ),
        base.mark_circle(size=110, opacity=1).encode(**place, x=x("ratio")),
        base.mark_point(size=110, filled=False, strokeWidth=2, opacity=1).encode(
            **place, x=x("new")
        ),
    ]
    if frame["paper"].notna().any():
        published = chart(frame.dropna(subset="paper")).mark_tick(thickness=3, size=18, color=INK)
        layers.append(published.encode(y=place["y"], x=x("paper")))
    return alt.layer(*layers).properties(height=30 * len(methods))


def rates_chart(rows: pd.DataFrame, rates: Mapping[str, float]) -> alt.HConcatChart:
    new = rows[(rows["head"] == NEW) & (rows["largest"] > 0)]
    sharpness = np.exp(np.log(new.set_index("method")["largest"]).groupby(level=0).mean())
    methods = ordered(set(rates) & set(sharpness.index))
    panels = []
    for values, title, power in (
        (sharpness.to_dict(), "λmax", -1.0),
        (first_steps(rows, NEW), "best rate of Adam’s first step", 1.0),
    ):
        known = [method for method in methods if method in values]
        points = pd.DataFrame({"method": m, "x": values[m], "rate": rates[m]} for m in known)
        if len(points) >= 2:
            panels.append(rate_panel(points, methods, title, power))
    return alt.hconcat(*panels, spacing=24)


def rate_panel(
    points: pd.DataFrame, methods: list[str], title: str, power: float
) -> alt.LayerChart:
    """A point per method, with its shape, and a law of this power through kaiming."""
    spread = [points["x"].min() / 1.5, points["x"].max() * 1.5]
    heights = [points["rate"].min() / 2, points["rate"].max() * 2]
    ticks = [base * 10.0**exponent for exponent in range(-6, 7) for base in (1, 3)]

    def axis(
        channel: type, field: str, label: str, limits: list[float], form: str
    ) -> alt.X | alt.Y:
        return channel(
            field,
            title=label,
            scale=alt.Scale(type="log", domain=limits, nice=False),
            axis=alt.Axis(values=[v for v in ticks if limits[0] <= v <= limits[1]], format=form),
        )

    x = axis(alt.X, "x:Q", title, spread, "~g")
    y = axis(alt.Y, "rate:Q", "best learning rate", heights, "~e")
    chosen = marks(methods)
    shapes = alt.Scale(domain=methods, range=[chosen[m].shape for m in methods])
    legend = alt.Legend(title=None, orient="bottom", columns=4)
    layers = []
    if BASELINE in set(points["method"]):
        anchor = points.set_index("method").loc[BASELINE]
        ends = np.geomspace(*spread, 50)
        line = pd.DataFrame({"x": ends, "rate": anchor["rate"] * (ends / anchor["x"]) ** power})
        line = line[line["rate"].between(*heights)]
        layers.append(chart(line).mark_line(strokeDash=[5, 4], color=GRAY).encode(x=x, y=y))
    layers.append(
        chart(points)
        .mark_point(size=120, filled=False, strokeWidth=2.4, opacity=1)
        .encode(
            x=x,
            y=y,
            color=methods_color(methods),
            shape=alt.Shape("method:N", scale=shapes, legend=legend),
            tooltip=tips("method:N", x=".3g", rate=".2e"),
        )
    )
    return alt.layer(*layers).properties(width=262, height=250)


def discuss(measured: Measurement) -> list[str]:
    """Adam's first step, the effect of the head, saddles, and the head's own curvature."""
    rows, rates = measured["starts"], best_rates(measured)
    heads = measured["heads"].groupby("head", sort=False)["largest"].mean()
    sentences = [
        "The largest eigenvalue bounds the rate of plain gradient descent, which moves along the "
        "gradient; Adam moves every entry by about the rate, however small its gradient, so that "
        "what bounds its rate is the curvature along signs. The tables hold both."
    ]
    for head in heads.index:
        steps = first_steps(rows, head)
        adam = correlate(steps, rates)
        missing = ", ".join(name for name in rates if name not in steps)
        if adam is not None:
            sentences.append(
                f"Adam’s first step, {head} head: the rate that a quadratic model likes best and "
                f"the tuned rates have a coefficient of {adam.coefficient:.2f} "
                f"(p = {adam.p_value:.2g}, {adam.methods} methods), tuned ∝ its power "
                f"{adam.exponent}."
                + (f" Left out, as their loss bends downwards there: {missing}." if missing else "")
            )
    before, after = ratios(rows, NEW), ratios(rows, TRAINED)
    shared = [name for name in before if name in after and name != BASELINE]
    again = correlate({name: ratio.value for name, ratio in after.items()}, rates)
    words = ", ".join(f"{n} {before[n].value:.3g} → {after[n].value:.3g}" for n in shared)
    return [
        *sentences,
        "A new head is small and random, and every curvature below it is scaled by it. From a new "
        f"head to a trained one the ratios to LoRA go: {words}"
        + (f"; the coefficient with the rates is then {again.coefficient:.2f}." if again else "."),
        saddles(rows, list(heads.index)),
        "The head’s own largest eigenvalue: "
        + ", ".join(f"{value:.3g} ({name} head)" for name, value in heads.items())
        + ". It belongs to no method, and its rate is the same for all in the sweeps.",
    ]


def saddles(rows: pd.DataFrame, heads: list[str]) -> str:
    """How far LoRA's start is from a bowl.

    With ∂²L/∂A² = 0 the cross term of A and B alone has eigenvalues in pairs of ±σ.
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
    discuss=discuss,
)

if __name__ == "__main__":
    run(REPRODUCTION)
