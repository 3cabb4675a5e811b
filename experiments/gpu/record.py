"""The measurements of one part, saved after every row.

A part that is killed keeps the rows that it has written.
"""

from __future__ import annotations

import json
import math
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_init.files import write_atomically

Status = Literal["running", "done", "failed", "killed", "skipped"]
MESSAGE_LENGTH = 300


@dataclass
class Record:
    """What one part measured.

    Attributes:
        part: the part's name.
        path: the JSON file; None keeps the record in memory.
        rows: one measurement each: a name, and figures by name.
        notes: what was left out, and why.
        wrong: results that break a promise. The command exits with status 1 if there are any.
        message: why the part did not finish.
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
        """Add a measurement and save the record."""
        self.rows.append({"name": name, **figures})
        self.write()
        return self.rows[-1]

    def note(self, text: str) -> None:
        """Add a sentence about what was left out."""
        self.notes.append(text)
        self.write()

    def refute(self, text: str) -> None:
        """Add a wrong result."""
        self.wrong.append(text)
        self.write()

    def end(self, status: Status, message: str = "", seconds: float | None = None) -> None:
        """Record how the part ended."""
        self.status, self.message, self.seconds = status, message, seconds
        self.write()

    def to_dict(self) -> dict[str, Any]:
        """All fields but the path, as JSON values."""
        return {name: plain(value) for name, value in asdict(self).items() if name != "path"}

    def write(self) -> None:
        if self.path is not None:
            text = json.dumps(self.to_dict(), indent=1)
            write_atomically(self.path, lambda path: path.write_text(text))

    @classmethod
    def read(cls, part: str, path: Path) -> Record:
        """Read a record; an empty one if the part has written none."""
        return cls(**json.loads(path.read_text()), path=path) if path.exists() else cls(part, path)


def plain(value: Any) -> Any:
    """Convert to JSON types. Numbers that are not finite become text."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def brief(error: BaseException) -> str:
    """An exception in one line, with the last line of this project that it passed through."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:MESSAGE_LENGTH]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "lora_init" in frame.filename or "experiments" in frame.filename:
            return f"{text} ({Path(frame.filename).name}:{frame.lineno})"
    return text
