"""What became of a trial, read from its run's folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from experiments.runs import RunFolder

UPDATE_STEP = 100


@dataclass(frozen=True)
class Outcome:
    """Of one run.

    Attributes:
        state: finished, diverged (the setting's fault: it counts, as the worst there is), or
            missing (not begun, killed, failed: nothing can be said of the setting).
        result: what result.json holds, where finished.
        folder: the run's.
    """

    state: str
    folder: RunFolder
    result: dict[str, Any] | None = None

    def merit(self, select_by: str) -> float:
        """The validation figure to choose by, greater is better; -inf where training diverged.

        Raises:
            ValueError: missing.
        """
        if self.state == "missing":
            raise ValueError(f"{self.folder.path} has not finished")
        if self.result is None:
            return -math.inf
        loss = self.result["validation"]["loss"]
        figure = -math.inf if loss is None else -loss  # JSON has null for what was not finite
        return self.result["validation_score"] if select_by == "score" else figure

    def update_size(self) -> float | None:
        """‖s(BA - B0 A0)‖ / ‖W‖ after `UPDATE_STEP` steps, or at the end of a shorter run."""
        try:
            lines = (self.folder.path / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return None
        sizes = {
            row["step"]: row["update_size"]
            for row in map(json.loads, lines)
            if row["split"] == "update"
        }
        early = [step for step in sizes if step <= UPDATE_STEP]
        return sizes[max(early)] if early else None


def outcome(folder: RunFolder) -> Outcome:
    result = folder.finished()
    if result is not None:
        return Outcome("finished", folder, result)
    try:
        failure = json.loads((folder.path / "failed.json").read_text())
    except (OSError, ValueError):
        return Outcome("missing", folder)
    return Outcome("diverged" if failure.get("reason") == "diverged" else "missing", folder)
