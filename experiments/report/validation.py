"""What a run's files may contain, so that every run fits into tables and charts.

Values of a wrong type and numbers that no chart can show are left out and reported. A run that
lacks a required value is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from ..config.bounds import MOST, SEEDS

REQUIRED = ("run_id", "method", "seed", "metric")
TEXTS = {"model": "unknown model", "data": "unknown data", "control": "none"}
"""Names of tasks and arms, with their replacements if they are missing."""
NUMBERS = (
    "score", "validation_score", "n_test", "majority", "loss_test", "init_seconds",
    "calibration_seconds", "train_seconds", "peak_memory_bytes", "first_step_gradient_norm",
    "trainable_parameters", "total_parameters", "steps", "learning_rate", "rank", "wall_seconds",
)  # fmt: skip
GROUPS = ("output_gap", "start", "end", "environment", "config", "init")
MEASURES = ("output_gap", "start", "end")
"""Groups of numbers."""
ROW_TEXTS = ("name", "module_type", "base", "split", "forgetting_kind")
LARGEST = 1e30
"""Sums and squares of such numbers are finite."""


class Gaps:
    """What was left out of one file, by name."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def add(self, name: str, value: object, must_be: str) -> None:
        self.reasons.setdefault(name, f"{name}={shown(value)} is not {must_be}")

    def reason(self) -> str:
        """The first three in one line; empty if nothing was left out."""
        found = list(self.reasons.values())
        return "; ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def clean_result(result: dict[str, Any], gaps: Gaps) -> dict[str, Any]:
    """The result without values of wrong types.

    Raises:
        ValueError: a required value is missing or wrong.
    """
    check_required(result)
    cleaned = dict(result)
    for key, default in TEXTS.items():
        cleaned[key] = kept(result, key, is_text, "a name", gaps) or default
    for key in NUMBERS:
        cleaned[key] = kept(result, key, is_number, "a number that a table can hold", gaps)
    for key in GROUPS:
        cleaned[key] = kept(result, key, is_object, "an object", gaps) or {}
    for key in MEASURES:
        cleaned[key] = clean_row(cleaned[key], gaps, f"{key}.")
    cleaned["notes"] = kept(result, "notes", is_list, "a list", gaps) or []
    return cleaned


def check_required(result: dict[str, Any]) -> None:
    """Raise a `ValueError` if a value that every run needs is missing or wrong."""
    status = result.get("status", "finished")
    if status != "finished":
        raise ValueError(f"its result.json says '{shown(status)}'")
    missing = [key for key in REQUIRED if result.get(key) is None]
    if result.get("score") is None and result.get("validation_score") is None:
        missing.append("score")
    if missing:
        raise ValueError(f"its result.json lacks {', '.join(missing)}")
    for key in ("run_id", "method", "metric"):
        if not is_text(result[key]):
            raise ValueError(f"its {key} is {shown(result[key])}, not a name")
    if type(result["seed"]) is not int or result["seed"] not in SEEDS:
        raise ValueError(f"its seed is {shown(result['seed'])}, not an integer of 64 bits")
    for key in ("score", "validation_score"):
        value = result.get(key)
        if value is not None and not is_number(value):
            why = ": the run diverged" if type(value) is float else ", not a number"
            raise ValueError(f"its {key} is {shown(value)}{why}")


def clean_layers(content: dict[str, Any], gaps: Gaps) -> dict[str, Any]:
    """`init.json` or `end.json` with its named layers and their numbers."""
    layers = []
    for layer in kept(content, "layers", is_list, "a list", gaps) or []:
        if isinstance(layer, dict) and is_text(layer.get("name")):
            details = layer.get("details")
            details = details if isinstance(details, dict) else {}
            layers.append({**clean_row(layer, gaps), "details": details})
        else:
            gaps.add("a layer", layer, "an object with a name")
    return {**content, "layers": layers}


def clean_metrics(rows: Iterable[Any], gaps: Gaps) -> list[dict[str, Any]]:
    """The rows with a step and a split, and their numbers."""
    cleaned = []
    for row in rows:
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is int and 0 <= step < 2**53 and is_text(row.get("split")):
            cleaned.append(clean_row(row, gaps))
        else:
            gaps.add("a row", row, "an object with a step and a split")
    return cleaned


def clean_row(row: dict[str, Any], gaps: Gaps, group: str = "") -> dict[str, Any]:
    """The row with names in `ROW_TEXTS` and numbers elsewhere, so that columns have one type.

    Lists and objects are left out: no table shows them.
    """
    cleaned: dict[str, Any] = {}
    for key, value in row.items():
        good = is_text(value) if key in ROW_TEXTS else is_number(value)
        if good or value is None:
            cleaned[key] = value
        elif not isinstance(value, list | dict):
            gaps.add(f"{group}{key}", value, "a name" if key in ROW_TEXTS else "a number")
    return cleaned


def kept(
    values: dict[str, Any], key: str, good: Callable[[object], bool], must_be: str, gaps: Gaps
) -> Any:
    """The value; None if it is missing or wrong, which `gaps` then names."""
    value = values.get(key)
    if value is None or good(value):
        return value
    gaps.add(key, value, must_be)
    return None


def is_object(value: object) -> bool:
    return isinstance(value, dict)


def is_list(value: object) -> bool:
    return isinstance(value, list)


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) <= MOST
    return type(value) is float and math.isfinite(value) and abs(value) <= LARGEST


def shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:30]}…"
