"""What may be said of a paper's claim after measuring it again."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """How a claim fared on the model at hand, which is smaller than the paper's."""

    REPRODUCED = "reproduced"
    SAME_DIRECTION = "same direction"
    NOT_REPRODUCED = "not reproduced"
    CONTRADICTS = "contradicts"
    NOT_JUDGED = "not judged"


@dataclass(frozen=True)
class Claim:
    """One statement of a paper, the figures on both sides, and what follows.

    Attributes:
        statement: the claim in one sentence.
        paper: the paper's figure, with its model; "–" where the paper has a statement only.
        ours: the figure measured here.
        criterion: what decided, in words, and what would have contradicted it.
        verdict: what it came to.
        remark: one sentence on a claim that does not hold, or on what limits the comparison.
        published: a paper says so; False for a question of our own beside its claims, which is
            judged alike and counted apart.
        timed: seconds decided, which another machine, or a busy one, may have otherwise.
    """

    statement: str
    paper: str
    ours: str
    criterion: str
    verdict: Verdict
    remark: str = ""
    published: bool = True
    timed: bool = False


def as_claim(kept: dict[str, Any]) -> Claim:
    """A claim from its fields as JSON has them.

    Raises:
        KeyError, ValueError, TypeError: they are not a claim's.
    """
    return Claim(**{**kept, "verdict": Verdict(kept["verdict"])})


def judge(*, holds: bool, direction: bool, opposite: bool = False) -> Verdict:
    """From three answers to one verdict.

    Args:
        holds: everything that the criterion asks for was measured.
        direction: not all of it, but the effect has the claimed sign.
        opposite: the effect has the other sign, beyond the noise.
    """
    if holds:
        return Verdict.REPRODUCED
    if direction:
        return Verdict.SAME_DIRECTION
    return Verdict.CONTRADICTS if opposite else Verdict.NOT_REPRODUCED
