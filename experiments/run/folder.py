"""A run's identity and its folder.

The identity is a hash of the resolved configuration without what cannot change the outcome (paths,
tracking, runtime, what is measured, the sweep's name, whether the test set is read). `result.json`
is written last and atomically: its existence means that the run finished. A finished run is
skipped; one without it goes on from its checkpoint, or starts over where it has none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from experiments.config.schema import RunConfig
from experiments.errors import DamagedFile
from experiments.run.files import as_object, read_object, read_regular, remove, scratch_path

LONGEST_PART = 60
OUTSIDE_IDENTITY = ("paths", "tracking", "runtime", "measures", "sweep", "read_test")

CAME_LATER: dict[str, dict[str, Any]] = {
    "model": {"dtype": "float32"},
    "calibration": {"path": None, "field": "question"},
}
"""Settings that runs once did not have, by group, with the values that mean what was done then.
They are left out of the identity where they have these: what is finished stays finished."""


@dataclass(frozen=True)
class RunFolder:
    """One run's id and where its files lie."""

    id: str
    path: Path

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def running_file(self) -> Path:
        return self.path / "running.json"

    @property
    def failed_file(self) -> Path:
        return self.path / "failed.json"

    @property
    def init_file(self) -> Path:
        return self.path / "init.json"

    @property
    def spectra_file(self) -> Path:
        return self.path / "spectra.json"

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint_file(self) -> Path:
        return self.path / "checkpoint" / "training.safetensors"

    @property
    def lock_file(self) -> Path:
        """Beside the folder, which may be emptied while it is held."""
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
        """Refuse a result that is not this run's, or that lacks what is read from it.

        Raises:
            ValueError: it says why.
        """
        if result.get("run_id") != self.id or result.get("status") != "finished":
            raise ValueError("it is not the result of this run")
        tested = result.setdefault("tested", result.get("score") is not None)  # older ones lack it
        if type(tested) is not bool:
            raise ValueError(f"tested must be true or false, not {tested!r}")
        for name in ("score", "validation_score"):
            value = result.get(name)
            needed = tested and name == "score" and name in result
            if type(value) not in (int, float) and (needed or value is not None):
                raise ValueError(f"{name} must be a number, not {value!r}")

    def damage(self) -> DamagedFile | None:
        """What is wrong with a result that is there and does not count."""
        try:
            self.check_result(read_object(self.result_file))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return DamagedFile(self.result_file, error)
        return None

    def start_over(self) -> None:
        """Leave an empty folder, whatever a killed or failed run left in it.

        Raises:
            ConfigurationError: what is there cannot be removed.
        """
        remove(self.path)
        self.path.mkdir(parents=True)

    def keep(self, *names: str) -> None:
        """Remove everything but these: a killed process may have left it incomplete."""
        for path in self.path.iterdir():
            if path.name not in names:
                remove(path)

    def remove_scratch(self) -> None:
        """Remove files that a killed process was in the middle of writing."""
        folders = [self.path, self.checkpoint_file.parent]
        for folder in folders:
            if not folder.is_symlink():
                for path in folder.glob(".*"):
                    remove(path)

    def forget_checkpoint(self) -> None:
        remove(self.checkpoint_file.parent)


def identify(run: RunConfig) -> RunFolder:
    """The folder that this configuration, and no other, writes to.

    The contents of a user's files are hashed too: edited data under an old path are a new run. A
    local model is known by its path alone.
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
    """A part of a folder's name. All of them fit into what file systems hold, 255 bytes."""
    return part.encode()[:LONGEST_PART].decode(errors="ignore")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that it is there completely or not at all."""
    write_text(path, json.dumps(finite(content), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """The same of a text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Temporary file, fsync, rename: no reader and no crash ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_path(path)
    try:
        with scratch.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """`metrics.jsonl`: one line a measurement, on disk before the next one is taken.

    Attributes:
        earlier: the rows of the first `keep` bytes, which a continued run keeps; what follows them
            came after its checkpoint, and is cut off.

    Raises:
        DamagedFile: there are no such rows in it.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.earlier = read_metrics(path, keep) if keep else []
        self.file: TextIO = path.open("a")
        self.file.truncate(keep)

    @property
    def size(self) -> int:
        """Bytes, all of them on disk."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def append(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(finite(row)) + "\n")
        self.file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


def read_metrics(path: Path, size: int | None = None) -> list[dict[str, Any]]:
    """The rows of the first `size` bytes (None: of all) of a `metrics.jsonl`.

    Raises:
        DamagedFile: it is not a file of so many bytes, or a line is not a row with step and split.
    """
    try:
        lines = read_regular(path, links=False)[:size].split(b"\n")
        rows = [as_object(line) for line in lines if line]
        for number, row in enumerate(rows, start=1):
            if type(row.get("step")) is not int or not isinstance(row.get("split"), str):
                raise ValueError(f"row {number} has no step or no split")
    except (OSError, ValueError) as error:
        raise DamagedFile(path, error) from error
    return rows
