"""A claim of a paper with its figures, ours, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """How a claim compares with the measurement, on a model smaller than the paper's."""

    REPRODUCED = "reproduced"
    SAME_DIRECTION = "same direction"
    NOT_REPRODUCED = "not reproduced"
    CONTRADICTS = "contradicts"
    NOT_RESOLVED = "not resolved"
    NOT_JUDGED = "not judged"


@dataclass(frozen=True)
class Claim:
    """One statement, the figures on both sides, and the verdict.

    Attributes:
        statement: the claim in one sentence.
        paper: the paper's figure, with its model; "–" where the paper gives no figure.
        ours: the figure measured here.
        criterion: what decides the verdict, in words, and what would contradict the claim.
        verdict: the verdict by that criterion.
        remark: one sentence on a claim that does not hold, or on a limit of the comparison.
        published: True if a paper makes the claim; False for a question that this project adds.
            Added questions are judged alike and counted separately.
        timed: True if seconds decide the verdict, which depend on the machine and its load.
    """

    statement: str
    paper: str
    ours: str
    criterion: str
    verdict: Verdict
    remark: str = ""
    published: bool = True
    timed: bool = False


def as_claim(values: dict[str, Any]) -> Claim:
    """Build a claim from its fields in JSON.

    Raises:
        KeyError, ValueError, TypeError: the fields are not those of a claim.
    """
    return Claim(**{**values, "verdict": Verdict(values["verdict"])})


def judge(*, holds: bool, direction: bool, opposite: bool = False) -> Verdict:
    """Turn three answers into one verdict.

    Args:
        holds: the measurement meets the whole criterion.
        direction: it does not, but the effect has the claimed sign.
        opposite: the effect has the other sign, beyond the noise.
    """
    if holds:
        return Verdict.REPRODUCED
    if direction:
        return Verdict.SAME_DIRECTION
    return Verdict.CONTRADICTS if opposite else Verdict.NOT_REPRODUCED
