"""One line of the benchmark: the contenders' figures, their ratio, and the quality beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from experiments.report.statistics import Interval

Unit = Literal["s", "MiB", "×"]
Verdict = Literal["met", "missed", "open"]
Peer = Literal["PEFT", "torch.linalg"]


@dataclass(frozen=True)
class Quality:
    """One figure of quality, and what is demanded of it.

    Attributes:
        limit: the most (or the least) that ours may be; None without a demand.
        least: whether `limit` is a lower bound.
    """

    ours: float | None = None
    peft: float | None = None
    limit: float | None = None
    least: bool = False

    @property
    def kept(self) -> bool | None:
        """Whether the demand is met; None without one, or without ours."""
        if self.limit is None or self.ours is None:
            return None
        return self.ours >= self.limit if self.least else self.ours <= self.limit


@dataclass(frozen=True)
class Row:
    """A comparison, or the reason why there is none.

    Attributes:
        section, model, case: what was measured.
        unit: of `ours`, `peft` and `exact`: seconds, MiB, or a factor.
        ours, peft, exact: medians; `exact` is torch.linalg's straightforward computation. None
            where a contender gave no figure, for the reason in `note`.
        ratio: the peer's over ours with its 95 % interval: above 1 ours takes less. Without a
            width where there are fewer than five pairs.
        peer: whom the ratio is against.
        target: the least ratio that is wanted.
        ceiling: the most that `ours` may be, in its unit.
        verdict: whether all that is wanted (or, for memory, the promise) was met; "open" where
            the interval contains the target.
        quality: by its name.
        figures: what was computed besides, by its name; equal names make a column.
        note: what a reader has to know.
    """

    section: str
    model: str
    case: str
    unit: Unit
    ours: float | None = None
    peft: float | None = None
    exact: float | None = None
    ratio: Interval | None = None
    peer: Peer = "PEFT"
    target: float | None = None
    ceiling: float | None = None
    verdict: Verdict | None = None
    quality: dict[str, Quality] = field(default_factory=dict)
    figures: dict[str, float | None] = field(default_factory=dict)
    note: str = ""


Hear = Callable[[Row], None]
"""Is told each row as soon as it is known."""


def ignore(row: Row) -> None:
    """Hears nothing."""


def verdict(ratio: Interval | None, target: float | None) -> Verdict | None:
    """Whether a ratio reaches its target, by its interval; None without one of them."""
    if ratio is None or target is None:
        return None
    if ratio.low >= target:
        return "met"
    return "missed" if ratio.high < target else "open"


def verdict_below(value: Interval | None, ceiling: float | None) -> Verdict | None:
    """Whether a value stays below its ceiling, by its interval; None without one of them."""
    if value is None or ceiling is None:
        return None
    if value.high <= ceiling:
        return "met"
    return "missed" if value.low > ceiling else "open"


def overall(verdicts: list[Verdict | None]) -> Verdict | None:
    """The worst of several; None where nothing was wanted."""
    for worst in ("missed", "open", "met"):
        if worst in verdicts:
            return worst
    return None
