"""LoftQ's claims: what iterations do to three errors, and whether the order matters."""

from __future__ import annotations

import itertools

import pandas as pd

from experiments.papers.loftq_iterations.intervals import paired_mean
from experiments.papers.loftq_iterations.settings import PAPERS_ITERATIONS
from experiments.papers.loftq_iterations.starts import LOFTQ, PLAIN, SVD_FIRST
from experiments.papers.verdicts import Claim, Verdict, judge

LOW_BITS = (4, 2)
SLACK = 1e-4  # of the error: the SVD itself is computed to no more
CASE = ["model", "bits", "rank"]
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
        "direction: the last one lies below the first on average",
        verdict=judge(
            holds=min(falling.values()) >= 0.95,
            direction=max(lower.values()) < 1,
            opposite=min(lower.values()) > 1,
        ),
        remark=""
        if min(falling.values()) >= 0.95
        else "The SVD is the best there is for its Q, "
        "so that a rise can only come from quantising: a block’s scale moves with its largest "
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
        "at 2 bits; same direction: in at least one layer",
        verdict=judge(holds=float(shares.max()) >= 0.05, direction=float(shares.max()) > 0),
        remark="Layer by layer the outputs’ ratio is "
        f"{apart.quantile(0.05):.2f} to {apart.quantile(0.95):.2f} times the weights’ (5 % to "
        "95 %): what an iteration takes away it takes from directions that the inputs use about as "
        "much as the others.",
    )


def model_claim(models: pd.DataFrame) -> Claim:
    """The model's error from each T to the next."""
    some = models[(models["method"] == LOFTQ) & models["bits"].isin(LOW_BITS)]
    found = []
    for case, group in some.groupby(CASE):
        errors = group.set_index("T")["error"].sort_index()
        pairs = list(itertools.pairwise(errors.index))
        if pairs:
            before, after = max(pairs, key=lambda pair: errors[pair[1]] / errors[pair[0]])
            found.append((errors[after] / errors[before], case, before, after, errors))
    rising = [one for one in found if one[0] > 1]
    ratio, (model, bits, rank), before, after, errors = max(found, key=lambda one: one[0])
    return Claim(
        statement="Nor need the error of the whole model fall with T",
        paper="rises at some T on RoBERTa and TinyLlama (statement; QERA’s figure 1)",
        ours=f"rises somewhere in {len(rising)} of {len(found)} settings; most at {bits} bits, "
        f"r = {rank} on {model}: {errors[before]:.3g} at T = {before}, {errors[after]:.3g} at "
        f"T = {after}",
        criterion="in at least one setting at 4 or 2 bits it rises by more than 1 % from one T to "
        "the next; same direction: it rises at all",
        verdict=judge(holds=ratio > 1.01, direction=ratio > 1),
    )


def order_claim(models: pd.DataFrame) -> Claim:
    """Both orders at 2 bits and one T, ended on an SVD: three errors."""
    count = int(models.loc[models["method"] == SVD_FIRST, "T"].max())
    some = models[(models["bits"] == 2) & (models["T"] == count)]
    by_method = some.set_index(["method", *CASE])[list(ERRORS)]
    ratios = by_method.loc[SVD_FIRST] / by_method.loc[LOFTQ] - 1
    means = ratios.mean()
    by_rank = ratios.groupby(level="rank").mean()
    largest = float(means.abs().max())
    return Claim(
        statement="Whether LoftQ quantises first or decomposes first hardly matters at 2 bits: "
        "errors at the start",
        paper="DeBERTaV3-base, 2 bits: MNLI 88.0 quantise first / 87.8 SVD first, QNLI 92.2 / 84.9",
        ours=f"SVD first at T = {count}: "
        + ", ".join(f"{ERRORS[name]} {means[name]:+.1%}" for name in ERRORS)
        + "; weights by rank: "
        + ", ".join(f"r = {rank} {row['weight']:+.1%}" for rank, row in by_rank.iterrows()),
        criterion="the mean of each error over the ranks differs by at most 5 %; same direction: "
        "by at most 15 %; contradicts: by more",
        verdict=judge(holds=largest <= 0.05, direction=largest <= 0.15, opposite=largest > 0.15),
        remark="Both quantise equally often and end on an SVD. The paper’s own second pair is "
        "7 points apart: a start’s error does not say where a training ends.",
    )


def training_claim(trained: pd.DataFrame) -> Claim:
    """Held-out losses after fine-tuning, sentence by sentence, seeds averaged."""
    loss = trained.pivot_table(index="sentence", columns="method", values="loss")
    accuracy = 100 * trained.groupby("method")["right"].mean()
    apart = paired_mean(loss[SVD_FIRST] - loss[LOFTQ])
    gain = paired_mean(loss[PLAIN] - loss[LOFTQ])
    by_seed = trained.pivot_table(index="seed", columns="method", values="loss")
    seeds = ", ".join(f"{d:+.3f}" for d in by_seed[SVD_FIRST] - by_seed[LOFTQ])
    verdict = judge(
        holds=abs(apart.value) <= gain.value / 4,
        direction=abs(apart.value) <= gain.value / 2,
        opposite=abs(apart.value) > gain.value and not apart.low <= 0 <= apart.high,
    )
    if gain.low <= 0:
        verdict = Verdict.NOT_JUDGED
    return Claim(
        statement="The same after fine-tuning from 2 bits",
        paper="DeBERTaV3-base, 2 bits: MNLI 88.0 / 87.8, QNLI 92.2 / 84.9",
        ours=f"held-out loss SVD first minus quantise first {apart.show()} (by seed {seeds}); "
        f"quantised only minus quantise first {gain.show()}; accuracy {accuracy[SVD_FIRST]:.1f} / "
        f"{accuracy[LOFTQ]:.1f} / {accuracy[PLAIN]:.1f}",
        criterion="the orders’ losses are at most a quarter of LoftQ’s gain over plain "
        "quantisation apart; same direction: half of it; contradicts: more than all of it, beyond "
        "the interval; not judged where LoftQ gains nothing beyond its interval",
        verdict=verdict,
        remark="A few dozen steps on short reviews; the intervals are over sentences, the seeds "
        "move the order of the data only.",
    )
