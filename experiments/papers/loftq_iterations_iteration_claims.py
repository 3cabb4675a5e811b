"""LoftQ's claims: what iterations do to three errors, and whether the order matters."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pandas as pd

from .claim import Claim, Verdict, judge
from .interval import Interval, geometric_mean, mean
from .loftq_iterations_rows import PAPERS_ITERATIONS
from .loftq_iterations_starts import LOFTQ, PLAIN, SVD_FIRST

LOW_BITS = (4, 2)
SLACK = 1e-4  # of the error: the SVD itself is computed to no more
CASE = ["model", "bits", "rank"]
MAY = "contradicts: nothing could, since it is said only that it may"
ERRORS = {"weight": "weights", "output": "layer outputs", "error": "whole model"}


def later_iterations(frame: pd.DataFrame) -> int:
    """The T that T = 1 is compared with: the paper's default, or the next one below it."""
    counts = frame.loc[frame["method"] == LOFTQ, "T"]
    return int(counts[counts <= PAPERS_ITERATIONS].max())


def weight_claim(paths: pd.DataFrame) -> Claim:
    """Every iteration against the one before it, layer by layer."""
    falling, lower = {}, {}
    for bits in LOW_BITS:
        wide = paths[paths["bits"] == bits].pivot(
            index=["model", "rank", "layer"], columns="iteration", values="weight"
        )
        steps = wide.diff(axis=1).iloc[:, 1:]
        falls = steps.le(SLACK * wide.iloc[:, 1:]).all(axis=1)
        falling[bits] = float(falls.mean())
        lower[bits] = float((wide.iloc[:, -1] / wide.iloc[:, 0]).mean())
    count = int(paths["iteration"].max())
    return Claim(
        statement="The weights’ error falls with every iteration of LoftQ",
        paper="falls for every T shown (statement; QERA’s figure 1)",
        ours="; ".join(
            f"{bits} bits: falls at every step to T = {count} in {falling[bits]:.0%} of the "
            f"layers, to {lower[bits]:.0%} of T = 1 on average"
            for bits in LOW_BITS
        ),
        criterion="in at least 95 % of the layers at 4 and at 2 bits no iteration raises it; same "
        "direction: the last one lies below the first on average at both; contradicts: above it at "
        "both",
        verdict=judge(
            holds=min(falling.values()) >= 0.95,
            direction=max(lower.values()) < 1,
            opposite=min(lower.values()) > 1,
        ),
        remark=""
        if min(falling.values()) >= 0.95
        else "The SVD is the best there is for its Q, "
        "so that a rise can only come from quantizing: a block’s scale moves with its largest "
        "weight.",
    )


def rises(layers: pd.DataFrame, later: int) -> pd.DataFrame:
    """Each error of LoftQ at T = `later` over that at T = 1, of layers that have both.

    Returns:
        A row a layer, bits and rank; columns `weight` and `output`.
    """
    some = layers[layers["method"] == LOFTQ].set_index([*CASE, "layer", "T"])
    errors = some[["weight", "output"]]
    return (errors.xs(later, level="T") / errors.xs(1, level="T")).dropna()


def output_claim(layers: pd.DataFrame) -> Claim:
    """Layers whose weight comes nearer while their output moves away."""
    later = later_iterations(layers)
    ratios = rises(layers[layers["bits"].isin(LOW_BITS)], later)
    worse = (ratios["output"] > 1) & (ratios["weight"] < 1)
    shares = worse.groupby(level="bits").mean()
    apart = ratios["output"] / ratios["weight"]
    return Claim(
        statement="A layer’s output error need not fall when the weight’s does",
        paper="it may rise with T (statement; QERA’s figure 1)",
        ours=f"from T = 1 to T = {later} it rises in "
        + ", ".join(f"{shares[b]:.1%} of the layers at {b} bits" for b in LOW_BITS)
        + f"; the mean ratio is {ratios['output'].mean():.3f} for the outputs (largest "
        f"{ratios['output'].max():.3f}), {ratios['weight'].mean():.3f} for the weights",
        criterion="it rises while the weight’s error falls in at least 5 % of the layers at 4 or "
        f"at 2 bits; same direction: in at least one layer; {MAY}",
        verdict=judge(holds=float(shares.max()) >= 0.05, direction=float(shares.max()) > 0),
        remark="Layer by layer the outputs’ ratio is "
        f"{apart.quantile(0.05):.2f} to {apart.quantile(0.95):.2f} times the weights’ (5 % to "
        "95 %).",
    )


@dataclass(frozen=True)
class Step:
    """LoftQ from one T to the next, in one setting.

    Attributes:
        case: model, bits, rank.
        before, after: T.
        ratio: the model's error after over that before, geometric mean over the texts at hand.
    """

    case: tuple
    before: int
    after: int
    ratio: Interval


def steps_of(texts: pd.DataFrame) -> list[Step]:
    """Every step of every setting, on these texts."""
    some = texts[(texts["method"] == LOFTQ) & texts["bits"].isin(LOW_BITS)]
    found = []
    for case, group in some.groupby(CASE):
        errors = group.pivot_table(index="text", columns="T", values="error")
        found += [
            Step(case, before, after, geometric_mean((errors[after] / errors[before]).tolist()))
            for before, after in itertools.pairwise(sorted(errors))
        ]
    return found


def model_claim(texts: pd.DataFrame) -> Claim:
    """The largest rise among many steps: found on every second text, judged on the others."""
    even, odd = (steps_of(texts[texts["text"] % 2 == rest]) for rest in (0, 1))
    chosen = max(range(len(even)), key=lambda number: even[number].ratio.value)
    judged = odd[chosen]
    model, bits, rank = judged.case
    everywhere = steps_of(texts)
    rising = sum(step.ratio.value > 1 for step in everywhere)
    return Claim(
        statement="The error of the whole model need not fall with LoftQ’s T either",
        paper="rises at some T on RoBERTa and TinyLlama (statement; QERA’s figure 1)",
        ours=f"rises in {rising} of {len(everywhere)} steps from one T to the next; the step that "
        f"every second text has the largest rise in: {bits} bits, r = {rank} on {model}, "
        f"T = {judged.before} → {judged.after}, {percent(judged.ratio)} on the other texts",
        criterion="the step with the largest rise on every second text rises on the other texts, "
        "too, beyond its 95 % interval (mean of the logarithms, text by text), at 4 or 2 bits; "
        f"same direction: rises there; {MAY}",
        verdict=judge(holds=judged.ratio.low > 1, direction=judged.ratio.value > 1),
    )


def percent(ratio: Interval) -> str:
    """A ratio as a change."""
    change = Interval(*(100 * (x - 1) for x in (ratio.value, ratio.low, ratio.high)))
    return f"{change.show('+.1f')} %"


def order_claim(models: pd.DataFrame) -> Claim:
    """Both orders at one T, ended on an SVD: three errors; judged at 2 bits, as the paper asks."""
    count = int(models.loc[models["method"] == SVD_FIRST, "T"].max())
    by_method = models[models["T"] == count].set_index(["method", *CASE])[list(ERRORS)]
    ratios = (by_method.loc[SVD_FIRST] / by_method.loc[LOFTQ] - 1).dropna()
    means = ratios.groupby(level="bits").mean()
    by_rank = ratios.xs(2, level="bits").groupby(level="rank").mean()
    largest = float(means.loc[2].abs().max())

    def told(bits: int) -> str:
        return ", ".join(f"{ERRORS[name]} {means.loc[bits, name]:+.1%}" for name in ERRORS)

    others = [bits for bits in sorted(means.index, reverse=True) if bits != 2]
    return Claim(
        statement="Whether LoftQ quantizes first or decomposes first hardly matters at 2 bits: "
        "errors at the start",
        paper=PAPERS_ORDERS,
        ours=f"SVD first less quantize first at T = {count}, 2 bits: {told(2)}; weights by rank: "
        + ", ".join(f"r = {rank} {row['weight']:+.1%}" for rank, row in by_rank.iterrows())
        + "".join(f". At {bits} bits: {told(bits)}" for bits in others),
        criterion="at 2 bits the mean of each error over the ranks differs by at most 5 %; same "
        "direction: by at most 15 %; contradicts: one of them by more than 30 %",
        verdict=judge(holds=largest <= 0.05, direction=largest <= 0.15, opposite=largest > 0.3),
        remark="Both quantize equally often and end on an SVD. The paper’s own second pair is "
        "7 points apart: a start’s error does not say where a training ends.",
    )


PAPERS_ORDERS = (
    "DeBERTaV3-base, 2 bits: MNLI 88.0 quantize first / 87.8 SVD first, QNLI 92.2 / 84.9"
)


def training_claim(trained: pd.DataFrame) -> Claim:
    """Held-out losses after fine-tuning, sentence by sentence, seeds averaged."""
    loss = trained.pivot_table(index="text", columns="method", values="loss")
    right = trained.pivot_table(index="text", columns="method", values="right")
    chance = float(trained["chance"].iloc[0])
    apart = mean((loss[SVD_FIRST] - loss[LOFTQ]).tolist())
    gain = mean((loss[PLAIN] - loss[LOFTQ]).tolist())
    learned = mean((right[LOFTQ] - chance).tolist())
    by_seed = trained.pivot_table(index="seed", columns="method", values="loss")
    seeds = ", ".join(f"{d:+.3f}" for d in by_seed[SVD_FIRST] - by_seed[LOFTQ])
    verdict = judge(
        holds=abs(apart.value) <= gain.value / 4,
        direction=abs(apart.value) <= gain.value / 2,
        opposite=abs(apart.value) > gain.value and not apart.low <= 0 <= apart.high,
    )
    if not (learned.above_zero and gain.above_zero):
        verdict = Verdict.NOT_JUDGED
    accuracy = 100 * right.mean()
    points = Interval(*(100 * (x + chance) for x in (learned.value, learned.low, learned.high)))
    return Claim(
        statement="Whether LoftQ quantizes first or decomposes first hardly matters at 2 bits: "
        "losses after a short fine-tuning",
        paper=PAPERS_ORDERS,
        ours=f"held-out loss SVD first less quantize first {apart.show()} (by seed {seeds}); "
        f"quantized only less quantize first {gain.show()}; accuracy, quantize first "
        f"{points.show('.1f')} %, SVD first {accuracy[SVD_FIRST]:.1f} %, quantized only "
        f"{accuracy[PLAIN]:.1f} %, the more frequent label {100 * chance:.1f} %",
        criterion="the orders’ losses are at most a quarter of LoftQ’s gain over plain "
        "quantization apart; same direction: half of it; contradicts: more than all of it, beyond "
        "the interval; not judged where LoftQ gains nothing beyond its interval, or where its "
        "accuracy is not above that of the more frequent label beyond its interval",
        verdict=verdict,
        remark="The intervals are over sentences; the seeds change only the order of the data.",
    )
