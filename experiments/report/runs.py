"""Read one run from its folder. Everything that cannot be read is reported by name."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..run.files import as_value, read_object, read_regular
from .validation import Gaps, clean_layers, clean_metrics, clean_result


@dataclass(frozen=True)
class Problem:
    """A run that is left out, or a gap in one that is not (`fatal` is then False)."""

    run: str
    reason: str
    fatal: bool = True


@dataclass(frozen=True)
class Run:
    """One finished run, without its predictions."""

    folder: Path
    result: dict[str, Any]
    init: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def run_id(self) -> str:
        return str(self.result["run_id"])

    @property
    def method(self) -> str:
        """The initializer with its control, which makes it another method to compare."""
        name = str(self.result["method"])
        if not self.is_control:
            return name
        control = str(self.result["control"]).replace("_", " ")
        return f"{control} (control)" if self.result["control"] == name else f"{name} ({control})"

    @property
    def is_control(self) -> bool:
        return self.result.get("control") not in (None, "none")


def failure_text(folder: Path | None) -> str:
    """What the run wrote into `failed.json`; empty if it wrote nothing readable."""
    if folder is None:
        return ""
    try:
        failure = read_json(folder / "failed.json")
        reason = failure.get("reason")
        kind = f"{reason}: " if reason and reason != "error" else ""
        return f": {kind}{failure['error']}: {failure['message']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def read_run(folder: Path) -> tuple[Run, list[Problem]]:
    """Read one run and list its gaps. Only `result.json` is required.

    Raises:
        FileNotFoundError: the folder or its result is missing.
        OSError: the result cannot be read.
        ValueError: the result cannot be used.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"its folder '{folder}' does not exist")
    left_out = Gaps()
    try:
        result = clean_result(read_json(folder / "result.json"), left_out)
    except FileNotFoundError as error:
        reason = failure_text(folder)
        raise FileNotFoundError(f"it has no result.json: it did not finish{reason}") from error
    label = f"{result['method']}, seed {result['seed']} ({result['run_id']})"
    gaps: list[Problem] = []

    def note(name: str, left_out: Gaps) -> None:
        if reason := left_out.reason():
            gaps.append(Problem(label, f"{name}: left out: {reason}", fatal=False))

    def part(name: str, read: Callable, clean: Callable, default: Any, optional=False) -> Any:
        left_out = Gaps()
        try:
            content = clean(read(folder / name), left_out)
        except (OSError, ValueError) as error:
            if not (optional and isinstance(error, FileNotFoundError)):
                gaps.append(Problem(label, f"{name} cannot be read: {error}", fatal=False))
            return default
        note(name, left_out)
        return content

    note("result.json", left_out)
    init = part("init.json", read_json, clean_layers, {})
    end = part("end.json", read_json, clean_layers, {}, optional=True)
    metrics = part("metrics.jsonl", read_lines, clean_metrics, [])
    return Run(folder, result, init, end, metrics), gaps


read_json = read_object


def read_lines(path: Path) -> list[Any]:
    """Values of a JSONL file, except a last line that a kill has cut short."""
    lines = [line for line in read_regular(path).split(b"\n") if line.strip()]
    try:  # one call for the whole file takes half the time of one call per line
        return as_value(b"[" + b",".join(lines) + b"]")
    except json.JSONDecodeError:
        rows = [as_value(line) for line in lines[:-1]]
    try:
        return [*rows, as_value(lines[-1])]
    except json.JSONDecodeError:
        return rows


def read_predictions(folder: Path, score: float) -> tuple[np.ndarray, np.ndarray]:
    """Example ids in ascending order, and whether each answer was correct.

    Raises:
        OSError: the predictions are missing.
        ValueError: they are damaged, or do not give this score.
    """
    content = io.BytesIO(read_regular(folder / "predictions.npz"))
    try:
        with np.load(content, allow_pickle=False) as archive:
            ids, correct = archive["id"], archive["correct"].astype(bool)
    except Exception as error:  # numpy and zipfile raise a dozen types for a damaged file
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if ids.shape != correct.shape or ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"id has shape {ids.shape} and correct {correct.shape}")
    if len(np.unique(ids)) != len(ids):
        raise ValueError("an example's id occurs twice")
    if abs(correct.mean() - score) > 1e-3:
        raise ValueError(
            f"its score is {score:.4f}, but {correct.mean():.4f} of its predictions are right: "
            "its interval is left out"
        )
    order = np.argsort(ids)
    return ids[order], correct[order]
