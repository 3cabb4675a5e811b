"""The record of one part: its rows, notes and wrong results, in a file that is always whole.

The file is rewritten after every row. A part that is killed leaves what it measured until then.
"""

from __future__ import annotations

import json
import math
import os
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["running", "done", "failed", "killed", "skipped"]
MESSAGE_LENGTH = 300


@dataclass
class Record:
    """What one part found.

    Attributes:
        part: the part's name.
        path: the JSON file; None keeps the record in memory.
        rows: one measurement each: a name, and figures by name.
        notes: what was left out, and why.
        wrong: results that break a promise; any of them makes the command exit with status 1.
        message: why the part did not end by itself.
    """

    part: str
    path: Path | None = None
    status: Status = "running"
    message: str = ""
    seconds: float | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def row(self, name: str, **figures: Any) -> dict[str, Any]:
        """Add a measurement and write the file."""
        made = {"name": name, **figures}
        self.rows.append(made)
        self.write()
        return made

    def note(self, text: str) -> None:
        """Add a sentence about what was left out."""
        self.notes.append(text)
        self.write()

    def refute(self, text: str) -> None:
        """Add a wrong result."""
        self.wrong.append(text)
        self.write()

    def end(self, status: Status, message: str = "", seconds: float | None = None) -> None:
        """Say how the part ended."""
        self.status, self.message, self.seconds = status, message, seconds
        self.write()

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["path"]
        return plain(values)

    def write(self) -> None:
        if self.path is None:
            return
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=1))
        os.replace(temporary, self.path)

    @classmethod
    def read(cls, part: str, path: Path) -> Record:
        """The record in a file; an empty one where the part wrote none."""
        if not path.exists():
            return cls(part, path)
        return cls(**json.loads(path.read_text()), path=path)


def plain(value: Any) -> Any:
    """The value in JSON's types; numbers that are not finite become text."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def brief(error: BaseException) -> str:
    """An exception in one line, with the last line of our code that it passed."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:MESSAGE_LENGTH]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "lora_init" in frame.filename or "experiments" in frame.filename
    ]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return text + where
