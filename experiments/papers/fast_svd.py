"""PiSSA by a fast SVD: error, time and training loss against the number of subspace iterations.

The paper replaces the full SVD of PiSSA by Halko's randomized SVD, `torch.svd_lowrank(W, q=r,
niter=N)`. For N = 1 … 16 it reports the time, an error and the loss at the end of training. At
r = 128 in Llama-2-7B: 22.67 s (N = 16) against 435.8 s for the full SVD; an error of 1.93e-3
(N = 1) falling to 4.75e-4 (N = 16); losses of .2301 (N = 1) and .2266 (N = 16) against .2264.

The paper's error is "the sum of the absolute differences" of both pairs of factors. It does not say
over how many entries, or whether signs were aligned, so only its change with N can be compared.
Four measures are used here, all against the full SVD of the same matrix, in float64:

    difference   ‖s B A − s B* A*‖ / ‖s B* A*‖, of the products that a model computes with
    excess       ‖W − s B A‖ / ‖W − s B* A*‖ − 1, the loss of the product as an approximation
    entries      the mean absolute difference of the entries of A and B, signs aligned
    overlap      the mean squared cosine of the angles between the ranges of B and B*

Measured in turns: `torch.svd_lowrank` with q = r, as the paper's code and PEFT call it, this
library's `pissa_niter_N` and `pissa`, and `torch.linalg.svd`. The matrices are those of a real
block, and a synthetic one with the size of a large model's and a known power law. Then come short
fine-tunings, from several N and from the exact triplets. PEFT makes the starts with niter, from the
global generator; everything after the start is the same.

Source: Meng et al. 2024, "PiSSA", arXiv 2404.02948, section 3 and the appendix on fast SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

import altair as alt
import pandas as pd

from .application import run
from .claim import Claim, Verdict, judge
from .drawing import LOG, color, plot
from .fast_svd_rows import EXACT, LOWRANK, NITER, PISSA, FastSvdOptions, measure
from .interval import Interval, mean
from .reproduction import Figure, Measurement, Reproduction, Table

# The paper's figures for Llama-2-7B, r = 128, by niter; None: the full SVD.
PAPER_ERRORS = {1: 1.93e-3, 16: 4.75e-4}
PAPER_SECONDS = {16: 22.67, None: 435.8}
PAPER_LOSSES = {1: 0.2301, 16: 0.2266, None: 0.2264}
FALL = PAPER_ERRORS[1] / PAPER_ERRORS[16]
SPEEDUP = PAPER_SECONDS[None] / PAPER_SECONDS[16]

MEASURES = ("difference", "excess", "entries", "overlap")
NO_NITER = -1
ROUNDING = 1e-7
SMALLEST = 1e-8  # drawn in place of excess errors of 0 and less, on a logarithmic axis


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """By source, rank, method and niter (-1: none): the mean errors and the seconds.

    Seconds are medians over rounds, summed over the matrices; `share` is their ratio to the full
    SVD's.
    """
    known = rows.assign(niter=rows["niter"].fillna(NO_NITER).astype(int))
    keys = ["source", "judged", "rank", "method", "niter"]
    times = known.groupby([*keys, "layer"], sort=False)[["seconds", "exact_seconds"]].median()
    found = times.groupby(level=keys, sort=False).sum()
    found["share"] = found["seconds"] / found["exact_seconds"]
    return found.join(known.groupby(keys, sort=False)[list(MEASURES)].mean()).reset_index()


def curves(figures: pd.DataFrame, method: str, column: str) -> dict[str, pd.Series]:
    """By source: one figure of one method over niter, at the judged rank."""
    some = figures[figures["judged"] & (figures["method"] == method)].set_index("niter")
    return {
        source: rows[column].sort_index() for source, rows in some.groupby("source", sort=False)
    }


def judge_all(measured: Measurement) -> list[Claim]:
    """Three claims on decompositions, two on training."""
    figures = summary(measured["decompositions"])
    ends = Ends.of(measured["steps"], measured["held_out"])
    return [
        error_claim(figures),
        time_claim(figures),
        pissa_claim(figures),
        agreement_claim(ends),
        cost_claim(ends),
    ]


def error_claim(figures: pd.DataFrame) -> Claim:
    """The claim on the error, judged on the entries of A and B as in the paper."""
    found = curves(figures, LOWRANK, "entries")
    products = curves(figures, LOWRANK, "difference")
    falls = {source: series[1] / series[16] for source, series in found.items()}
    ours = [
        f"{source}: {ends_of(series)} (÷ {falls[source]:.1f}), of s B A relatively "
        f"{ends_of(products[source])} (÷ {products[source][1] / products[source][16]:.1f})"
        for source, series in found.items()
    ]
    steadily = all(series.is_monotonic_decreasing for series in found.values())
    return Claim(
        statement="More subspace iterations bring the fast SVD nearer to the full one",
        paper=f"Llama-2-7B, r = 128, niter 1 → 16: 1.93e-3 → 4.75e-4 (÷ {FALL:.1f}), the sum of "
        "the absolute differences of A and B, in a unit that is not given",
        ours="mean absolute difference of the entries of A and B from the full SVD’s, "
        + "; ".join(ours),
        criterion=f"the entries’ difference falls with every niter, and by at least the paper’s "
        f"factor of {FALL:.1f} from 1 to 16, on every source; same direction: falls from 1 to 16 "
        "on every source; contradicts: rises on every source",
        verdict=judge(
            holds=steadily and min(falls.values()) >= FALL,
            direction=min(falls.values()) > 1,
            opposite=max(falls.values()) < 1,
        ),
    )


def ends_of(series: pd.Series) -> str:
    """The figures at niter 1 and 16."""
    return f"{series[1]:.3g} → {series[16]:.3g}"


def show_excess(excess: float) -> str:
    """An excess error; below the rounding of float32 it can have either sign."""
    return f"{excess:.1g}" if excess > ROUNDING else f"below {ROUNDING:g}"


def time_claim(figures: pd.DataFrame) -> Claim:
    """The claim on the time."""
    faster = {source: 1 / share[16] for source, share in curves(figures, LOWRANK, "share").items()}
    largest = list(faster)[-1]
    return Claim(
        statement="Even with 16 subspace iterations the fast SVD takes a fraction of the full "
        "one’s time",
        paper=f"Llama-2-7B, r = 128: 22.67 s against 435.8 s ({SPEEDUP:.1f} times)",
        ours="; ".join(f"{source}: {ratio:.1f} times" for source, ratio in faster.items()),
        criterion=f"at least half of the paper’s {SPEEDUP:.1f} times on {largest}; same direction: "
        "faster than the full SVD on every source; contradicts: slower on every source",
        verdict=judge(
            holds=faster[largest] >= SPEEDUP / 2,
            direction=min(faster.values()) > 1,
            opposite=max(faster.values()) < 1,
        ),
        remark="Times are of this machine, in turns with the full SVD; the paper’s matrices are "
        "4096 wide and more.",
        timed=True,
    )


def pissa_claim(figures: pd.DataFrame) -> Claim:
    """This library's own promise: no niter has to be chosen."""
    nearer, quicker, ours = [], [], []
    excess, share = (curves(figures, PISSA, column) for column in ("excess", "share"))
    their_excess, their_share = (curves(figures, LOWRANK, c) for c in ("excess", "share"))
    for source in excess:
        pissa, lowrank = excess[source][NO_NITER], their_excess[source][16]
        speedup = their_share[source][16] / share[source][NO_NITER]
        nearer.append(pissa <= lowrank)
        quicker.append(speedup >= 1)
        ours.append(
            f"{source}: excess error {show_excess(pissa)} against {show_excess(lowrank)}, "
            f"{speedup:.1f} times as fast"
        )
    return Claim(
        statement="A Krylov space needs no niter: `pissa` of this library is nearer to the full "
        "SVD than 16 iterations, in less time",
        paper="– (not the paper’s)",
        ours="; ".join(ours) + ", against torch.svd_lowrank with niter 16",
        criterion="excess error and time both no larger, on every source; same direction: the "
        "error is, on every source; contradicts: the error is larger on every source",
        verdict=judge(
            holds=all(nearer) and all(quicker), direction=all(nearer), opposite=not any(nearer)
        ),
        published=False,
        timed=True,
    )


@dataclass(frozen=True)
class Ends:
    """The losses at the end of the fine-tunings.

    Attributes:
        by_start: the mean training loss of the last quarter of the steps, over draws.
        held_out: the loss of each unseen block, a column per start, means over draws.
        by_draw: (start, draw) -> the mean of the unseen blocks' losses.
    """

    by_start: dict[str, float]
    held_out: pd.DataFrame
    by_draw: pd.Series

    @classmethod
    def of(cls, steps: pd.DataFrame, held_out: pd.DataFrame) -> Ends:
        count = int(steps["step"].max())
        late = steps[steps["step"] > count - max(1, count // 4)]
        return cls(
            late.groupby("start", sort=False)["loss"].mean().to_dict(),
            held_out.pivot_table(index="block", columns="start", values="loss", sort=False),
            held_out.groupby(["start", "draw"], sort=False)["loss"].mean(),
        )

    def above(self, start: str, other: str = EXACT) -> Interval:
        """The difference of the unseen blocks' losses, block by block."""
        return mean((self.held_out[start] - self.held_out[other]).tolist())

    def show(self, start: str) -> str:
        exact, unseen = self.by_start[EXACT], self.held_out.mean()
        apart = 100 * (self.by_start[start] / exact - 1)
        percent = 100 * (unseen[start] / unseen[EXACT] - 1)
        draws = ", ".join(f"{loss - unseen[EXACT]:+.4f}" for loss in self.by_draw[start])
        return (
            f"unseen texts {unseen[start]:.4f} against {unseen[EXACT]:.4f}, difference "
            f"{self.above(start).show('+.4f')} ({percent:+.2f} %; by draw {draws}); training loss "
            f"at the end {self.by_start[start]:.4f} against {exact:.4f} ({apart:+.2f} %)"
        )


def agreement_claim(ends: Ends) -> Claim:
    """An equivalence: the interval must lie within a margin, so that noise makes it no easier."""
    gap, margin = ends.above("niter 16"), ends.above("niter 1")
    verdict = judge(
        holds=-margin.value / 4 <= gap.low and gap.high <= margin.value / 4,
        direction=abs(gap.value) <= margin.value / 2,
        opposite=gap.low > margin.value / 2,
    )
    return Claim(
        statement="Training from 16 subspace iterations ends where training from the full SVD does",
        paper=f"{PAPER_LOSSES[16]} against {PAPER_LOSSES[None]} (+0.09 %), training loss",
        ours=ends.show("niter 16"),
        criterion="the 95 % interval of the difference, over unseen blocks, lies within a quarter "
        "of niter 1’s difference on either side of 0; same direction: the difference is at most "
        "half of niter 1’s; contradicts: its interval lies above half of it; not judged where "
        "niter 1’s own difference is not above 0 beyond its interval",
        verdict=verdict if margin.above_zero else Verdict.NOT_JUDGED,
    )


def cost_claim(ends: Ends) -> Claim:
    """The claim that one iteration is too few."""
    gaps = [ends.above("niter 1"), ends.above("niter 1", "niter 16")]
    return Claim(
        statement="One subspace iteration is too few: training from it ends at a higher loss",
        paper=f"{PAPER_LOSSES[1]} against {PAPER_LOSSES[None]} (+1.6 %), training loss",
        ours=ends.show("niter 1") + f"; against niter 16 {gaps[1].show('+.4f')}",
        criterion="on unseen texts above the exact start’s loss and above niter 16’s, both beyond "
        "their 95 % intervals over blocks; same direction: above both; contradicts: below the "
        "exact start’s beyond its interval",
        verdict=judge(
            holds=all(gap.above_zero for gap in gaps),
            direction=all(gap.value > 0 for gap in gaps),
            opposite=gaps[0].below_zero,
        ),
    )


def tabulate(measured: Measurement) -> list[Table]:
    """Decompositions by method, and losses by start."""
    ends = Ends.of(measured["steps"], measured["held_out"])
    unseen = ends.held_out.mean()
    losses = [
        {
            "start": start,
            "loss at the end": loss,
            "unseen texts": unseen[start],
            "unseen, minus exact": ends.above(start).show("+.4f"),
        }
        for start, loss in ends.by_start.items()
    ]
    figures = summary(measured["decompositions"])
    return [
        Table(
            "decompositions",
            "Fast decompositions against the full SVD",
            figures.assign(niter=figures["niter"].where(figures["niter"] != NO_NITER)),
            dict.fromkeys(MEASURES, ".1e") | {"seconds": ".3f", "share": ".1%", "niter": ".0f"},
            f"The paper, r = 128: error {PAPER_ERRORS[1]:.3g} (niter 1), {PAPER_ERRORS[16]:.3g} "
            f"(16); {PAPER_SECONDS[16]} s (16) against {PAPER_SECONDS[None]} s. Seconds: sum over "
            "the matrices; share: of the full SVD’s.",
        ),
        Table(
            "losses",
            "Loss after a short fine-tuning, by the start",
            pd.DataFrame(losses),
            dict.fromkeys(["loss at the end", "unseen texts"], ".4f"),
            "Loss at the end: mean over the last quarter of the steps and over draws. Brackets: "
            "95 % interval over blocks of unseen text. The paper’s losses: 0.2301 (niter 1), "
            "0.2266 (16), 0.2264 (exact).",
        ),
    ]


def draw(measured: Measurement) -> list[Figure]:
    """Excess error over time, and the training losses."""
    figures = summary(measured["decompositions"])
    judged = figures[figures["judged"]]
    judged = judged.assign(excess=judged["excess"].clip(lower=SMALLEST))
    steps = measured["steps"]
    exact = steps[steps["start"] == EXACT].set_index("step")["loss"]
    losses = steps[steps["start"] != EXACT]
    losses = losses.assign(above=losses["loss"] - losses["step"].map(exact))
    return [
        Figure(
            "cost",
            "What accuracy costs: excess error against time",
            "Both as shares of the full SVD’s, by niter. To the lower left is better.",
            plot(
                judged[["source", "method", "niter", "share", "excess", "entries"]],
                "line",
                alt.X("share:Q", scale=LOG, title="time, full SVD = 1"),
                alt.Y("excess:Q", scale=LOG, title="excess Frobenius error"),
                color=color("method", [LOWRANK, NITER, PISSA]),
                panel="source",
                order="niter:Q",
            ),
            width=None,
        ),
        Figure(
            "training",
            "Loss from a fast start, less that from the exact one",
            "Training loss of each step. The steps’ texts are the same for all starts.",
            plot(
                losses[["start", "draw", "step", "above"]],
                "line",
                alt.X("step:Q", axis=alt.Axis(tickMinStep=1)),
                alt.Y("above:Q", title="loss minus the exact start’s, nats"),
                color=color("start", losses["start"].unique().tolist()),
                dash="draw",
                level=0,
            ),
        ),
    ]


REPRODUCTION = Reproduction(
    name="fast_svd",
    title="PiSSA: a fast SVD is enough",
    source="Meng et al. 2024, arXiv 2404.02948, section 3 and the appendix on fast SVD",
    question="How many subspace iterations does PiSSA’s decomposition need, and does training "
    "notice?",
    options=FastSvdOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
)

if __name__ == "__main__":
    run(REPRODUCTION)
