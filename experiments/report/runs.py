"""Read runs from disk. What cannot be read is named, never dropped in silence."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

REQUIRED = ("run_id", "method", "seed", "score", "metric")


@dataclass(frozen=True)
class Problem:
    """A run that takes no part in the figures, or a gap in one that does."""

    run: str
    reason: str
    fatal: bool = True


@dataclass(frozen=True)
class Run:
    """One finished run as its folder tells it."""

    folder: Path
    result: dict[str, Any]
    init: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    example_ids: np.ndarray | None = None
    correct: np.ndarray | None = None

    @property
    def run_id(self) -> str:
        return str(self.result["run_id"])

    @property
    def method(self) -> str:
        return str(self.result["method"])

    @property
    def seed(self) -> int:
        return int(self.result["seed"])

    @property
    def score(self) -> float:
        return float(self.result["score"])

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.seed} ({self.run_id})"


def told_failure(folder: Path | None) -> str:
    """What the run itself left in `failed.json`, if it could."""
    try:
        failure = read_json(folder / "failed.json")
        return f": {failure['error']}: {failure['message']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def load_run(folder: Path) -> tuple[Run, list[Problem]]:
    """Read one run. Without a usable `result.json` it is no run; other gaps are reported."""
    if not folder.is_dir():
        raise FileNotFoundError(f"its folder '{folder}' does not exist")
    if not (folder / "result.json").is_file():
        reason = told_failure(folder)
        raise FileNotFoundError(f"it has no result.json: it did not finish{reason}")
    result = read_json(folder / "result.json")
    missing = [key for key in REQUIRED if result.get(key) is None]
    if missing:
        raise ValueError(f"its result.json lacks {', '.join(missing)}")
    if result.get("status", "finished") != "finished":
        raise ValueError(f"its result.json says '{result['status']}'")
    if not np.isfinite(float(result["score"])):
        raise ValueError(f"its score is {result['score']}: the run diverged")

    label = f"{result['method']}, seed {result['seed']} ({result['run_id']})"
    gaps: list[Problem] = []

    def attempt(what: str, read, default):
        try:
            return read()
        except (OSError, ValueError, KeyError, TypeError) as error:
            gaps.append(Problem(label, f"{what} cannot be read: {error}", fatal=False))
            return default

    init = attempt("init.json", lambda: read_json(folder / "init.json"), {})
    metrics = attempt("metrics.jsonl", lambda: read_lines(folder / "metrics.jsonl"), [])
    ids, correct = attempt(
        "predictions.npz", lambda: read_predictions(folder / "predictions.npz"), (None, None)
    )
    if correct is not None and abs(correct.mean() - float(result["score"])) > 1e-3:
        gaps.append(
            Problem(
                label,
                f"its score is {result['score']:.4f}, but {correct.mean():.4f} of its predictions "
                "are right: its interval is left out",
                fatal=False,
            )
        )
        ids = correct = None
    return Run(folder, result, init, metrics, ids, correct), gaps


def read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"'{path.name}' holds a {type(value).__name__}, not an object")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file. A last line cut short by a kill is not an error."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise
    return rows


def read_predictions(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Example ids in ascending order and whether each was answered correctly."""
    with np.load(path, allow_pickle=False) as archive:
        ids, correct = archive["id"], archive["correct"].astype(bool)
    if ids.shape != correct.shape or ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"id has shape {ids.shape} and correct {correct.shape}")
    if len(np.unique(ids)) != len(ids):
        raise ValueError("an example's id occurs twice")
    order = np.argsort(ids)
    return ids[order], correct[order]
