"""What a run's files may contain, so that every run fits into tables and charts.

Values of a wrong type and numbers that no chart can show are left out and reported. A run that
lacks a required value is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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
NESTED = ("output_gap", "gradient_norms")
"""Objects within a group. No table shows them."""
ROW_TEXTS = ("name", "module_type", "base", "split")
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
    cleaned = dict(result)
    for key, default in TEXTS.items():
        if not is_text(cleaned.get(key)):
            if cleaned.get(key) is not None:
                gaps.add(key, cleaned[key], "a name")
            cleaned[key] = default
    for key in NUMBERS:
        keep_number(cleaned, key, gaps)
    for key in GROUPS:
        cleaned[key] = group(cleaned, key, gaps)
    for key in ("output_gap", "start", "end"):
        for name in list(cleaned[key]):
            if name in NESTED:
                cleaned[key][name] = group(cleaned[key], name, gaps)
            elif name != "forgetting_kind":
                keep_number(cleaned[key], name, gaps, f"{key}.{name}")
            elif not is_text(cleaned[key][name]):
                gaps.add(f"{key}.{name}", cleaned[key].pop(name), "a name")
    if not isinstance(cleaned.get("notes"), list):
        if cleaned.get("notes") is not None:
            gaps.add("notes", cleaned["notes"], "a list")
        cleaned["notes"] = []
    return cleaned


def clean_layers(content: dict[str, Any], gaps: Gaps) -> dict[str, Any]:
    """`init.json` or `end.json` with its named layers and their numbers."""
    layers = content.get("layers")
    if layers is None:
        return {**content, "layers": []}
    if not isinstance(layers, list):
        gaps.add("layers", layers, "a list")
        return {**content, "layers": []}
    kept = []
    for layer in layers:
        if isinstance(layer, dict) and is_text(layer.get("name")):
            details = layer.get("details")
            kept.append(clean_row(layer, gaps) | {
                "details": details if isinstance(details, dict) else {}
            })  # fmt: skip
        else:
            gaps.add("a layer", layer, "an object with a name")
    return {**content, "layers": kept}


def clean_metrics(rows: Iterable[Any], gaps: Gaps) -> list[dict[str, Any]]:
    """The rows with a step and a split, and their numbers."""
    kept = []
    for row in rows:
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is int and 0 <= step < 2**53 and is_text(row.get("split")):
            kept.append(clean_row(row, gaps))
        else:
            gaps.add("a row", row, "an object with a step and a split")
    return kept


def clean_row(row: dict[str, Any], gaps: Gaps) -> dict[str, Any]:
    """The row with names in `ROW_TEXTS` and numbers elsewhere, so that columns have one type."""
    kept: dict[str, Any] = {}
    for key, value in row.items():
        good = is_text(value) if key in ROW_TEXTS else is_number(value)
        if good or value is None:
            kept[key] = value
        elif not isinstance(value, list | dict):
            gaps.add(key, value, "a name" if key in ROW_TEXTS else "a number")
    return kept


def keep_number(values: dict[str, Any], key: str, gaps: Gaps, name: str | None = None) -> None:
    value = values.get(key)
    if value is not None and not is_number(value):
        gaps.add(name or key, value, "a number that a table can hold")
        values[key] = None


def group(values: dict[str, Any], key: str, gaps: Gaps) -> dict[str, Any]:
    found = values.get(key)
    if isinstance(found, dict):
        return dict(found)
    if found is not None:
        gaps.add(key, found, "an object")
    return {}


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) <= MOST
    return type(value) is float and math.isfinite(value) and abs(value) <= LARGEST


def shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:30]}…"
