"""One line of the results, and one comparison that produces such lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from .timing import Ratio

OURS, PEFT, LINALG = "lora_init", "PEFT", "torch.linalg"


@dataclass(frozen=True)
class Row:
    """A comparison.

    Attributes:
        unit: of `ours`, `peft`, `linalg` and `whole`: seconds, MiB, or a multiple.
        ours, peft, linalg: medians; None where a contender took no part (see `note`).
        whole: ours on all layers, where the others are figures of a sample.
        ratio: the peer's figure divided by ours.
        peer: the contender that the ratio compares with.
        error, peft_error: of the factors (`quality.MEANINGS`), `kind` says which.
        planned: what the plan estimates, in the unit.
    """

    section: str
    model: str
    case: str
    rank: int | None = None
    unit: Literal["s", "MiB", "×"] = "s"
    ours: float | None = None
    peft: float | None = None
    linalg: float | None = None
    whole: float | None = None
    ratio: Ratio | None = None
    peer: str = PEFT
    error: float | None = None
    peft_error: float | None = None
    kind: str = ""
    planned: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One comparison, which yields its rows when it is measured."""

    section: str
    model: str
    name: str
    measure: Callable[[], Iterable[Row]]
    rank: int | None = None
