"""The result of an evaluation: figures over all examples, and one row per example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data import Generated


@dataclass(frozen=True)
class Evaluation:
    """The result of a task on one split.

    Attributes:
        metrics: means over the split; holds "loss" and the task's own metric.
        ids: the examples' ids, in ascending order.
        correct: whether each was answered correctly; its mean is the score.
        score: the log-probability of each right answer, a finer figure.
        said: the generated texts, if the task generates.
    """

    metrics: dict[str, float]
    ids: np.ndarray
    correct: np.ndarray
    score: np.ndarray
    said: tuple[Generated, ...] | None = None


def collect(rows: list[dict[str, Any]], metric: str) -> Evaluation:
    """Combine rows of `id`, `correct`, `score`, `loss`, `weight`, `said` and others.

    "loss" is the mean over what `weight` counts (tokens, or examples); every other numeric column
    is averaged over examples. Rows are summed in the order of their ids, so the figures do not
    depend on batches or processes.
    """
    rows = sorted(rows, key=lambda row: row["id"])
    total = sum(row["weight"] for row in rows)
    metrics = {"loss": float(sum(row["loss"] for row in rows) / total)}
    known = ("id", "correct", "score", "loss", "weight", "said")
    extra = [key for key in rows[0] if key not in known]
    for key in extra:
        metrics[key] = float(np.mean([row[key] for row in rows]))
    scored = [row for row in rows if row["correct"] is not None]
    correct = np.array([row["correct"] for row in scored], dtype=bool)
    metrics[metric] = float(correct.mean())
    return Evaluation(
        metrics=metrics,
        ids=np.array([row["id"] for row in scored], dtype=np.int64),
        correct=correct,
        score=np.array([row["score"] for row in scored], dtype=np.float32),
        said=tuple(row["said"] for row in scored) if scored and "said" in scored[0] else None,
    )
