"""`protocol.json` in the sweep's folder: the runs of each stage, and the chosen settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...config.protocol import ProtocolConfig
from ...run.files import write_json
from ...run.folder import RunFolder


@dataclass
class Record:
    """The content of the file, written before every stage so that others can follow the sweep.

    Attributes:
        path: of the file.
        stages: each stage's name and its runs; the current one is last.
        selected: by arm (and rank): the setting chosen on validation data, and its runs' ids.
        equal_update: by arm (and rank): the rate of equal update size, and its runs' ids.
    """

    path: Path
    settings: ProtocolConfig
    stages: list[dict[str, Any]] = field(default_factory=list)
    selected: dict[str, dict[str, Any]] = field(default_factory=dict)
    equal_update: dict[str, dict[str, Any]] = field(default_factory=dict)

    def stage(self, name: str, folders: list[RunFolder]) -> None:
        """Add a stage, by its runs' ids and their folders' names."""
        ids, names = [f.id for f in folders], [f.path.name for f in folders]
        self.stages.append({"name": name, "runs": ids, "folders": names})
        self.write()

    def write(self) -> None:
        content = asdict(self) | {"settings": asdict(self.settings)}
        del content["path"], content["settings"]["_target_"], content["settings"]["application"]
        write_json(self.path, content)
