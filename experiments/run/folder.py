"""A run's identity and its folder.

The identity is a hash of the configuration without what cannot change the outcome. `result.json` is
written last and atomically, so its existence means that the run finished.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config.run_config import RunConfig
from ..errors import DamagedFile
from .files import read_object, remove

LONGEST_PART = 60
OUTSIDE_IDENTITY = ("paths", "tracking", "runtime", "measures", "sweep", "read_test")

CAME_LATER: dict[str, dict[str, Any]] = {
    "model": {"dtype": "float32"},
    "calibration": {"path": None, "field": "question"},
}
"""Settings that older runs did not have, with the values that mean what those runs did. They are
not part of the identity at these values, so that finished runs stay finished."""


def inside(*parts: str) -> property:
    """A path inside the run's folder."""
    return property(lambda self: self.path.joinpath(*parts))


@dataclass(frozen=True)
class RunFolder:
    """A run's id, its folder, and the paths of its files."""

    id: str
    path: Path

    result_file = inside("result.json")
    running_file = inside("running.json")
    failed_file = inside("failed.json")
    init_file = inside("init.json")
    spectra_file = inside("spectra.json")
    config_file = inside("config.yaml")
    environment_file = inside("environment.json")
    metrics_file = inside("metrics.jsonl")
    checkpoint_file = inside("checkpoint", "training.safetensors")

    @property
    def lock_file(self) -> Path:
        """Next to the folder, which may be emptied while the lock is held."""
        return self.path.parent / f".{self.path.name}.lock"

    def finished(self) -> dict[str, Any] | None:
        """The result if the run is complete, else None."""
        try:
            result = read_object(self.result_file)
            self.check_result(result)
        except (OSError, ValueError):
            return None
        return result

    def check_result(self, result: dict[str, Any]) -> None:
        """Refuse a result of another run, or one that lacks what is read from it.

        Raises:
            ValueError: it names the reason.
        """
        if result.get("run_id") != self.id or result.get("status") != "finished":
            raise ValueError("it is not the result of this run")
        tested = result.setdefault("tested", result.get("score") is not None)  # older runs
        if type(tested) is not bool:
            raise ValueError(f"tested must be true or false, not {tested!r}")
        for name in ("score", "validation_score"):
            value = result.get(name)
            needed = tested and name == "score" and name in result
            if type(value) not in (int, float) and (needed or value is not None):
                raise ValueError(f"{name} must be a number, not {value!r}")

    def damage(self) -> DamagedFile | None:
        """The error for a result file that exists and is not usable."""
        try:
            self.check_result(read_object(self.result_file))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return DamagedFile(self.result_file, error)
        return None

    def start_over(self) -> None:
        """Empty the folder of what a killed or failed run left in it."""
        remove(self.path)
        self.path.mkdir(parents=True)

    def keep(self, *names: str) -> None:
        """Remove everything but these."""
        for path in self.path.iterdir():
            if path.name not in names:
                remove(path)

    def remove_scratch(self) -> None:
        """Remove files that a killed process did not finish writing."""
        for folder in (self.path, self.checkpoint_file.parent):
            if not folder.is_symlink():
                for path in folder.glob(".*"):
                    remove(path)

    def forget_checkpoint(self) -> None:
        remove(self.checkpoint_file.parent)


def identify(run: RunConfig) -> RunFolder:
    """The folder that this configuration, and no other, writes to.

    The contents of a user's files are hashed too: edited data under an old path are a new run. A
    local model is identified by its path alone.
    """
    identity = {key: value for key, value in asdict(run).items() if key not in OUTSIDE_IDENTITY}
    for group, settings in CAME_LATER.items():
        identity[group] = {
            key: value
            for key, value in identity[group].items()
            if key not in settings or value != settings[key]
        }
    if hasattr(run.data, "contents"):
        identity["data contents"] = run.data.contents()
    if run.calibration.path is not None:
        identity["calibration contents"] = run.calibration.contents()
    text = json.dumps(identity, sort_keys=True)
    run_id = hashlib.sha256(text.encode()).hexdigest()[:10]
    parts = [run.init.name, run.model.name, run.data.name, f"s{run.seed}", run_id]
    name = "-".join(shortened(re.sub(r"[^\w.]+", "_", part)) for part in parts)
    return RunFolder(run_id, Path(run.paths.outputs) / "runs" / name)


def shortened(part: str) -> str:
    """A part of a folder's name, cut so that the whole name fits into 255 bytes."""
    return part.encode()[:LONGEST_PART].decode(errors="ignore")
