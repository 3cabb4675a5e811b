"""Runs that diverged: they have no score, and a robustness curve that hides them flatters."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from experiments.run.files import read_regular

from .runs import Run, read_json
from .sweeps import Sweep
from .validation import is_number, is_text
from .wording import mantissa

NAMED = 8


def diverged(sweep: Sweep) -> list[str]:
    """What diverged, such as "olora r=8 at 1e-2 (2 runs)", lowest rates first; the last says how
    many more settings there are."""
    found: Counter[tuple[float, str]] = Counter()
    for entry in sweep.entries:
        if entry.status != "finished" and entry.folder is not None:
            setting = read_setting(entry.folder)
            if setting is not None:
                found[setting] += 1
    told = [
        f"{name} at {mantissa(rate)} ({count} run{'s' * (count != 1)})"
        for (rate, name), count in sorted(found.items())
    ]
    return told if len(told) <= NAMED else [*told[:NAMED], f"{len(told) - NAMED} more settings"]


def read_setting(folder: Path) -> tuple[float, str] | None:
    """Learning rate and name of a run that diverged; None of one that did not, or cannot be read
    (it is then named among the runs that were left out, as all are)."""
    try:
        if read_json(folder / "failed.json").get("reason") != "diverged":
            return None
        config: dict[str, Any] = yaml.safe_load(read_regular(folder / "config.yaml"))
        known = {"method": config["init"]["name"], "control": config.get("control")}
        name = f"{Run(folder, known).method} r={config['lora']['r']}"
        rate = config["training"]["learning_rate"]
        return (float(rate), name) if is_number(rate) and is_text(known["method"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        return None
