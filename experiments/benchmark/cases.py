"""What the process of one model told of one strategy at one rank, put in order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

NAMES = {"ours": "ours", "peft": "PEFT", "exact": "torch.linalg"}
"""The contenders as a reader knows them."""
BARE = " without"
"""The suffix of the contender that makes the same call with `init_lora_weights=False`."""


@dataclass
class Case:
    """What was told of one strategy at one rank.

    Attributes:
        seconds: by contender, by round: the initialization alone, or the whole call where drawn.
        whole, without, passes: the parts of it, likewise.
        quality: by figure, by contender.
        calibrated: seconds of our pass over the data, which no turn contains.
    """

    rank: int
    method: str
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    whole: dict[str, dict[int, float]] = field(default_factory=dict)
    without: dict[str, dict[int, float]] = field(default_factory=dict)
    passes: dict[str, dict[int, float]] = field(default_factory=dict)
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    calibrated: float = 0.0
    peak: float | None = None
    allowed: float | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, reports: Sequence[dict[str, Any]], rank: int, method: str) -> Case:
        case = cls(rank, method)
        tables = [defaultdict(dict) for _ in range(3)]
        case.whole, case.without, case.passes = tables
        remembered: dict[str, float] = {}
        for told in reports:
            case.shapes = [tuple(shape) for shape in told.get("shapes", case.shapes)]
            case.calibrated = told.get("pass", case.calibrated)
            case.peak = told.get("peak", case.peak)
            case.allowed = told.get("allowed", case.allowed)
            if told.get("note"):
                case.notes.append(told["note"])
            if "contender" in told:
                case._take(told, remembered)
        case.seconds = {contender: case._net(contender) for contender in case.whole}
        for contender, seconds in remembered.items():
            case.seconds[contender] = {0: seconds}
            case.notes.append(f"{NAMES[contender]}: a full decomposition, measured in a row above")
        return case

    def _take(self, told: dict[str, Any], remembered: dict[str, float]) -> None:
        contender = told["contender"]
        if "error" in told:
            note = f"{NAMES[contender.removesuffix(BARE)]}: {told['error']}"
            if note not in self.notes:  # the call without the method fails alike
                self.notes.append(note)
        elif told.get("remembered"):
            remembered[contender] = told["seconds"]
        elif contender.endswith(BARE):
            self.without[contender.removesuffix(BARE)][told["round"]] = told["seconds"]
        else:
            self.whole[contender][told["round"]] = told["seconds"]
            if "calibration" in told:
                self.passes[contender][told["round"]] = told["calibration"]
            if "gap" in told:
                self.gaps[contender] = told["gap"]
            for figure, value in told.get("quality", {}).items():
                self.quality.setdefault(figure, {})[contender] = value

    def _net(self, contender: str) -> dict[int, float]:
        """Each round's call, less its pass over data and the round's call without the method."""
        without, passes = self.without[contender], self.passes[contender]
        return {
            number: seconds - passes.get(number, 0.0) - without.get(number, 0.0)
            for number, seconds in self.whole[contender].items()
            if number in without or not without
        }

    def median_of(self, contender: str) -> float | None:
        seconds = self.seconds.get(contender)
        return median(seconds.values()) if seconds else None
