"""Log-spaced learning rates around a middle, and where a grid goes on when its best is at an edge.

Rates are counted in steps k from the middle c: rate(k) = c · 10^(k / per_decade), rounded to three
significant digits, so that a rate is the same number, and its run the same run, however often the
grid is drawn up.
"""

from __future__ import annotations

from collections.abc import Iterable


def rate(middle: float, step: int, per_decade: int) -> float:
    """The learning rate `step` places above the middle."""
    return float(f"{middle * 10 ** (step / per_decade):.3g}")


def first_steps(count: int) -> list[int]:
    """The places of a first grid; an even number leans downwards, where runs do not diverge."""
    return list(range(-(count // 2), count - count // 2))


def next_step(tried: Iterable[int], best: int, extensions: int) -> int | None:
    """The place beyond the edge at which the best lies; None if it lies inside, or too many
    places were added before.

    Args:
        tried: all places so far.
        best: the best of them.
        extensions: how many more may be added.
    """
    tried = sorted(tried)
    if extensions < 1 or best not in (tried[0], tried[-1]):
        return None
    # A single rate is both edges: upwards first.
    return best + 1 if best == tried[-1] else best - 1
