"""The outcome of a trial, from its run's folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...errors import DamagedFile
from ...run.files import read_object
from ...run.folder import RunFolder
from ...run.metrics import read_metrics

UPDATE_STEP = 100


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run.

    Attributes:
        state: finished; diverged, which counts as the worst figure; or missing (not started,
            killed or failed), which says nothing about the setting.
        folder: the run's folder.
        result: the content of result.json if it is finished.
    """

    state: str
    folder: RunFolder
    result: dict[str, Any] | None = None

    def merit(self, select_by: str) -> float:
        """The validation figure to choose by, greater is better; -inf if training diverged.

        Raises:
            ValueError: the run is missing.
        """
        if self.state == "missing":
            raise ValueError(f"{self.folder.path} has not finished")
        if self.result is None:
            return -math.inf
        figure = self.result.get("validation_score")
        if select_by == "loss":
            loss = (self.result.get("validation") or {}).get("loss")
            figure = -loss if type(loss) in (int, float) else None
        # JSON has null for what was not finite.
        return figure if type(figure) in (int, float) else -math.inf

    def update_size(self) -> float | None:
        """‖s(BA - B0 A0)‖ / ‖W‖ after `UPDATE_STEP` steps, or at the end of a shorter run."""
        try:
            rows = read_metrics(self.folder.metrics_file)
        except DamagedFile:
            return None
        sizes = {
            row["step"]: row["update_size"]
            for row in rows
            if row["split"] == "update" and type(row.get("update_size")) in (int, float)
        }
        early = [step for step in sizes if step <= UPDATE_STEP]
        return sizes[max(early)] if early else None


def outcome(folder: RunFolder) -> Outcome:
    result = folder.finished()
    if result is not None:
        return Outcome("finished", folder, result)
    try:
        failure = read_object(folder.failed_file)
    except (OSError, ValueError):
        return Outcome("missing", folder)
    return Outcome("diverged" if failure.get("reason") == "diverged" else "missing", folder)
