"""Rows -> tables."""

from __future__ import annotations

import pandas as pd

from experiments.papers.fast_svd.judging import MEASURES, NO_NITER, Ends, summary
from experiments.papers.fast_svd.settings import PAPER_ERRORS, PAPER_LOSSES, PAPER_SECONDS
from experiments.papers.fast_svd.starts import EXACT, Training
from experiments.papers.findings import Table

NAMES = {
    "difference": "difference of s B A", "excess": "excess error", "entries": "mean |Δ entry|",
    "overlap": "overlap",
}  # fmt: skip


def tables(rows: pd.DataFrame, training: Training) -> list[Table]:
    figures = summary(rows)
    return [decompositions(figures, judged=True), losses(training), decompositions(figures, False)]


def decompositions(figures: pd.DataFrame, judged: bool) -> Table:
    """At the judged ranks, or at the others."""
    frame = figures[figures["judged"] == judged].copy()
    frame["niter"] = frame["niter"].where(frame["niter"] != NO_NITER)
    frame["share"] *= 100
    frame = frame[["source", "rank", "method", "niter", "seconds", "share", *MEASURES]]
    renamed = frame.rename(columns={**NAMES, "share": "of the full SVD’s, %"})
    formats = {"seconds": ".3f", "of the full SVD’s, %": ".1f", "niter": ".0f"}
    formats |= dict.fromkeys(list(NAMES.values())[:3], ".1e") | {"overlap": ".4f"}
    return Table(
        "decompositions" if judged else "other_ranks",
        "Fast decompositions against the full SVD, at the paper’s rank per width"
        if judged
        else "Fast decompositions against the full SVD, at other ranks",
        renamed, formats,
        note=f"The paper, r = 128: error {PAPER_ERRORS[1]:.3g} (niter 1), {PAPER_ERRORS[16]:.3g} "
        f"(16); {PAPER_SECONDS[16]} s (16) against {PAPER_SECONDS[None]} s. Seconds: sum over the "
        "matrices.",
    )  # fmt: skip


def losses(training: Training) -> Table:
    ends = Ends.of(training)
    unseen = ends.held_out.mean()
    made = []
    for start, loss in ends.by_start.items():
        niter = None if start == EXACT else int(start.removeprefix("niter "))
        made.append(
            {"start": start, "draws": len(ends.by_draw[start]), "loss at the end": loss,
             "minus exact": loss - ends.by_start[EXACT], "unseen texts": unseen[start],
             "unseen, minus exact": ends.above(start).show("+.4f"),
             "paper’s loss": PAPER_LOSSES.get(niter)}
        )  # fmt: skip
    plain = dict.fromkeys(["loss at the end", "unseen texts", "paper’s loss"], ".4f")
    return Table(
        "losses", "Loss after a short fine-tuning, by the start", pd.DataFrame(made),
        {"minus exact": "+.4f", **plain},
        note="Loss at the end: mean over the last quarter of the steps and over draws. Brackets: "
        "95 % interval over blocks of unseen text.",
    )  # fmt: skip
