"""The figures that a run is compared with. They were written down before any GPU ran the command.

docs/gpu.md shows them and explains how they were estimated.
"""

from __future__ import annotations

from dataclasses import dataclass

from .record import Record

SECONDS = {
    "kaiming": (0.10, 0.52),
    "gaussian": (0.10, 0.52),
    "orthogonal": (0.10, 0.52),
    "random": (0.10, 0.52),
    "init_ab": (0.10, 0.52),
    "init_ab_subtracted": (0.10, 0.52),
    "olora": (0.03, 0.08),
    "pissa": (0.45, 4.82),
    "pissa_niter_4": (0.26, 2.14),
    "milora": (3.10, 14.88),
    "mica": (3.10, 14.88),
    "loftq": (4.27, 19.08),
    "qpissa": (4.27, 19.08),
    "qera": (1.77, 8.90),
    "eva": (0.98, 9.73),
    "corda": (0.96, 7.15),
    "corda_kpm": (5.70, 24.23),
    "lora_null": (3.87, 16.28),
    "lora_null_frozen": (3.87, 16.28),
    "lora_ga": (0.84, 7.39),
    "lora_one": (0.84, 7.39),
    "gora": (0.21, 0.69),
    "loram": (0.05, 0.08),
    "matched_norm": (0.70, 5.88),
    "random_bases": (0.54, 5.33),
}
"""Seconds to initialize Llama-2-7B's 224 linear layers on an H200, at rank 16 and at rank 128."""


def expected_seconds(method: str, rank: int) -> float | None:
    """The expected seconds of a whole model; None without an estimate."""
    return dict(zip((16, 128), SECONDS.get(method, ()), strict=False)).get(rank)


@dataclass(frozen=True)
class Goal:
    """The most (or the least) that one figure of the report should be.

    Attributes:
        part, row, column: where the figure is. A row of None takes the largest of all rows.
        least: whether `limit` is a lower bound.
    """

    name: str
    limit: float
    unit: str
    part: str
    row: str | None
    column: str
    least: bool = False

    def found(self, records: dict[str, Record]) -> float | None:
        """The figure; None where the part, the row or the column is missing."""
        rows = records[self.part].rows if self.part in records else []
        values = [row.get(self.column) for row in rows if self.row in (None, row["name"])]
        return max((float(v) for v in values if isinstance(v, int | float)), default=None)

    def met(self, found: float) -> bool:
        return found >= self.limit if self.least else found <= self.limit


GOALS = (
    Goal("gap of s B A, model on the CPU", 1e-6, "of ‖W‖", "agreement", None, "gap_cpu"),
    Goal("gap of s B A, model on the GPU", 1e-6, "of ‖W‖", "agreement", None, "gap_device"),
    Goal("PiSSA r=16 of Llama-2-7B", 1.0, "s", "methods", "pissa r=16", "model_seconds"),
    Goal("PiSSA r=128 of Llama-2-7B", 2.0, "s", "methods", "pissa r=128", "model_seconds"),
    Goal("slowest method of Llama-2-7B", 10.0, "s", "methods", None, "model_seconds"),
    Goal(
        "calibration, second moments", 3.0, "plain passes",
        "calibration", "second moments (eva)", "passes",
    ),
    Goal(
        "PEFT's LoRA step over ours", 1.1, "times",
        "training", "PEFT LoRA / LoRA", "ratio", least=True,
    ),
    Goal("PiSSA's step over LoRA's", 1.1, "times", "training", "PiSSA / LoRA", "ratio"),
)  # fmt: skip


def verdicts(
    records: dict[str, Record],
    small: bool = False,
) -> list[dict[str, object]]:
    """Each goal, the figure that was found, and whether it is met. The small form judges none."""
    made: list[dict[str, object]] = []
    for goal in GOALS:
        found = goal.found(records)
        bound = "at least" if goal.least else "at most"
        made.append(
            {
                "goal": goal.name,
                "wanted": f"{bound} {goal.limit:g} {goal.unit}",
                "found": found,
                "met": None if found is None or small else goal.met(found),
            }
        )
    return made
