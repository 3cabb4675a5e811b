"""One fixed color and shape per method, in every chart and every report.

The colors are those of Okabe and Ito, which people with common color deficiencies can tell apart;
grey replaces their yellow, which is invisible on white. The reserve colors are far from these and
from each other, but some are close without red-green vision. Shapes repeat the distinction.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

BASELINE = "kaiming"


@dataclass(frozen=True)
class Mark:
    color: str
    shape: str


MARKS = {
    "kaiming": Mark("#1f2328", "circle"),
    "gaussian": Mark("#8b949e", "square"),
    "orthogonal": Mark("#56b4e9", "triangle-up"),
    "olora": Mark("#0072b2", "diamond"),
    "pissa": Mark("#d55e00", "cross"),
    "corda": Mark("#e69f00", "triangle-down"),
    "loftq": Mark("#009e73", "triangle-right"),
    "eva": Mark("#cc79a7", "triangle-left"),
}
RESERVE = ("#882255", "#8c510a", "#999933", "#332288", "#cc6677", "#661100", "#984ea3", "#c51b7d")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")


def ordered(methods: set[str]) -> list[str]:
    """The methods of `MARKS` in their fixed order, then the others by name."""
    return [m for m in MARKS if m in methods] + sorted(methods - MARKS.keys())


def marks(methods: list[str]) -> dict[str, Mark]:
    """A mark for each method. Other methods get a reserve color that depends on their name only.

    If two of them collide, the later one in the alphabet gets the next color. With more methods
    than colors, a color is used again with another shape.
    """
    chosen = {m: MARKS[m] for m in methods if m in MARKS}
    taken: set[Mark] = set()
    for method in sorted(set(methods) - MARKS.keys()):
        first = crc32(method.encode())
        candidates = [
            Mark(RESERVE[slot], SHAPES[(slot + turn) % len(SHAPES)])
            for turn in range(len(SHAPES))
            for slot in ((first + step) % len(RESERVE) for step in range(len(RESERVE)))
        ]
        chosen[method] = next((m for m in candidates if m not in taken), candidates[0])
        taken.add(chosen[method])
    return {m: chosen[m] for m in methods}
