"""The benchmark's time: what the whole of it may take, and what a model's process has left.

`seconds` is kept by giving up what costs most and says least: first further turns, then peers that
are known to take longer than is left, last the strategies of models that are `optional`. What ours
takes on all others is always measured, once at least, and a row says what it lacks and why. A
machine that is fast enough never comes to that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Clock:
    """Counts down from `seconds`; None never ends.

    Its end is a reading of the machine's monotonic clock, which all processes share.
    """

    seconds: float | None = None

    def __post_init__(self) -> None:
        self.ends = None if self.seconds is None else time.monotonic() + self.seconds

    @classmethod
    def until(cls, ends: float | None) -> Clock:
        return cls(None if ends is None else ends - time.monotonic())

    @property
    def left(self) -> float:
        return math.inf if self.ends is None else self.ends - time.monotonic()

    def part(self, share: float) -> Clock:
        """A clock over a share of what is left: who takes less leaves the rest to all others."""
        return Clock(None if self.ends is None else max(self.left, 0.0) * share)


CHEAP = 2.0  # seconds that a peer may take in any case
HALF, MOST = 0.5, 0.9  # of a clock, kept for strategies whose needs are not, or are told in advance


class Allowance:
    """A model's clock, less what every strategy that is still to come is expected to need.

    What is kept for them is never more than a share of the whole: peers shall have the rest.
    """

    def __init__(self, reserve: float) -> None:
        self.most = reserve
        self.start(Clock(), 0)

    def start(self, clock: Clock, strategies: int, needs: Sequence[float] | None = None) -> None:
        """Begin to count.

        Args:
            needs: seconds of each strategy (`needs.py`); None: the flat reserve for each.
        """
        self.clock = clock
        share = HALF if needs is None else MOST
        needs = [self.most] * strategies if needs is None else needs
        scale = min(1.0, share * max(clock.left, 0.0) / max(sum(needs), 1e-9))
        self.needs = [scale * seconds for seconds in needs]

    def begin_strategy(self) -> None:
        self.needs = self.needs[1:]

    @property
    def free(self) -> float:
        """Seconds that the strategy at hand may take; below 0 it takes what it cannot do without"""
        return self.clock.left - sum(self.needs)

    @property
    def over(self) -> bool:
        return self.clock.left <= 0

    def refusal(self, needed: float, first: bool = False) -> str | None:
        """Why something that takes `needed` seconds is not begun; None: it may be.

        Args:
            first: it comes before what is still to come: all that is left is for it.
        """
        free = self.clock.left if first else self.free
        if needed <= max(free, CHEAP):
            return None
        left = f"{max(free, 0.0):.0f} s of the model's share of `seconds` are left for it"
        return f"about {needed:.0f} s, and {left}" if needed >= 1 else left
