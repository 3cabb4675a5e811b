"""`protocol.json` in the sweep's folder: what was run in which stage, and what was chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.protocol.settings import ProtocolConfig
from experiments.runs import write_json


@dataclass
class Record:
    """Rewritten whole after every stage, so that a report can be made of a sweep that still runs.

    Attributes:
        path: of the file.
        stages: each stage's name and the ids of its runs.
        selected: by arm (and rank): the setting chosen on validation data, and its runs' ids.
        equal_update: by arm (and rank): the rate of equal update size, and its runs' ids.
    """

    path: Path
    settings: ProtocolConfig
    stages: list[dict[str, Any]] = field(default_factory=list)
    selected: dict[str, dict[str, Any]] = field(default_factory=dict)
    equal_update: dict[str, dict[str, Any]] = field(default_factory=dict)

    def stage(self, name: str, run_ids: list[str]) -> None:
        self.stages.append({"name": name, "runs": run_ids})
        self.write()

    def write(self) -> None:
        content = asdict(self) | {"settings": asdict(self.settings)}
        del content["path"], content["settings"]["_target_"]
        write_json(self.path, content)
