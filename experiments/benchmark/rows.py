"""One line of the benchmark: both contenders' figures, their ratio, and the quality beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from experiments.report.statistics import Interval

Unit = Literal["s", "MiB", "×"]
Verdict = Literal["met", "missed", "open"]


@dataclass(frozen=True)
class Row:
    """A comparison, or the reason why there is none.

    Attributes:
        section, model, case: what was measured.
        unit: of `ours` and `peft`: seconds, MiB, or a factor.
        ours, peft: medians; None where a contender gave no figure, for the reason in `note`.
        ratio: PEFT's over ours with its 95 % interval: above 1 ours takes less.
        target: the least ratio that is wanted.
        verdict: whether the target (or, for memory, the promise) was met; "open" where the
            interval contains the target.
        figures: what was computed besides, by its name; equal names make a column.
        note: what a reader has to know.
    """

    section: str
    model: str
    case: str
    unit: Unit
    ours: float | None = None
    peft: float | None = None
    ratio: Interval | None = None
    target: float | None = None
    verdict: Verdict | None = None
    figures: dict[str, float | None] = field(default_factory=dict)
    note: str = ""


def verdict(ratio: Interval | None, target: float | None) -> Verdict | None:
    """Whether a ratio reaches its target, by its interval; None without one of them."""
    if ratio is None or target is None:
        return None
    if ratio.low >= target:
        return "met"
    return "missed" if ratio.high < target else "open"
