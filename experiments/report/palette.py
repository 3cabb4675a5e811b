"""One fixed colour and shape per method, in every chart and in every report.

The colours are those of Okabe and Ito, which stay apart under the common colour deficiencies,
with its yellow (invisible on white) replaced by grey. Later methods take colours that are far
from those and from each other; some come near each other without red-green vision. Shapes repeat
the distinction, there and for prints without colour.
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
    """The known methods in their fixed order, then the others by name."""
    return [m for m in MARKS if m in methods] + sorted(methods - MARKS.keys())


def marks(methods: list[str]) -> dict[str, Mark]:
    """A mark for each method. A newcomer's colour follows from its name, whatever else is there
    (unless two newcomers collide: then the later one in the alphabet moves on). Where there are
    more of them than colours, a colour comes again with another shape."""
    chosen = {m: MARKS[m] for m in methods if m in MARKS}
    taken: set[Mark] = set()
    for method in sorted(set(methods) - MARKS.keys()):
        candidates = _candidates(method)
        chosen[method] = next((m for m in candidates if m not in taken), candidates[0])
        taken.add(chosen[method])
    return {m: chosen[m] for m in methods}


def _candidates(method: str) -> list[Mark]:
    """Every colour from the method's own on, then all of them with the next shape, and so on."""
    first, colors = crc32(method.encode()), len(RESERVE)
    slots = [(first + step) % colors for step in range(colors)]
    return [
        Mark(RESERVE[slot], SHAPES[(slot + turn) % len(SHAPES)])
        for turn in range(len(SHAPES))
        for slot in slots
    ]
