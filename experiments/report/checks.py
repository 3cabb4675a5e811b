"""What a reader must know before trusting a figure."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ..run.files import read_regular
from .cells import mantissa, plural
from .choices import TEST, Choice
from .palette import BASELINE
from .runs import Problem, Run, read_json
from .summary import Row
from .sweeps import Sweep
from .validation import is_number, is_text

CLEARLY_ABOVE_MAJORITY = 0.10
VALUES, SETTINGS = 6, 8  # that one line lists


def setting_warnings(different: dict[str, list]) -> list[str]:
    """One line per setting that differs although a fair comparison keeps it equal."""
    warnings = []
    for key, values in different.items():
        shown = ["missing" if value is None else str(value) for value in values[:VALUES]]
        more = f" and {len(values) - VALUES} more" if len(values) > VALUES else ""
        warnings.append(f"The runs differ in {key}: {', '.join(shown)}{more}")
    return warnings


def shared_seeds(runs: pd.DataFrame) -> list[Problem]:
    """Several runs of one setting with the same seed, which do not count as several seeds."""
    counts = runs.groupby(["task", "arm", "learning_rate", "seed"], dropna=False).size()
    return [
        Problem(arm, f"{count} runs have seed {seed}; each is counted", fatal=False)
        for (_, arm, _, seed), count in counts[counts > 1].items()
    ]


def choice_warnings(runs: pd.DataFrame, choices: list[Choice]) -> list[str]:
    """What weakens the choice of the settings at which the methods are compared."""
    warnings = []
    missing = sorted(set(runs["method"]) - {choice.method for choice in choices})
    if missing:
        warnings.append(
            f"The protocol has not chosen a setting for {', '.join(missing)} yet. The comparison "
            "leaves this out."
        )
    edges = dict.fromkeys(f"{c.arm} ({c.learning_rate:g})" for c in choices if c.at_edge)
    if edges:
        warnings.append(
            "The chosen learning rate is the lowest or the highest that was tried, so the best may "
            f"lie beyond: {', '.join(edges)}."
        )
    if any(choice.by == TEST and choice.rates > 1 for choice in choices):
        warnings.append(
            "The learning rates were chosen by the same test scores that are shown, because no "
            "run has a validation score. The best of several scores is too high by chance."
        )
    tried = {choice.rates for choice in choices}
    if len(tried) > 1 and min(tried) == 1:
        alone = ", ".join(c.arm for c in choices if c.rates == 1)
        warnings.append(
            f"Only some methods were tuned. These had one learning rate only: {alone}. The "
            "comparison is not fair."
        )
    return warnings


def baseline_warnings(rows: list[Row], majority: float | None) -> list[str]:
    """A comparison with a baseline that has learned nothing means little."""
    best = max((row.score.estimate for row in rows if row.is_baseline), default=None)
    if majority is None or best is None:
        return []
    if best < majority + CLEARLY_ABOVE_MAJORITY:
        return [
            f"{BASELINE} scores {100 * best:.1f} %; always answering the majority class scores "
            f"{100 * majority:.1f} %. With so little learned, differences between methods mean "
            "little."
        ]
    return []


def diverged(sweep: Sweep) -> list[str]:
    """The settings at which runs diverged, lowest rates first: "olora r=8 at 1e-2 (2 runs)".

    Such runs have no score, so a curve without this list would look too good.
    """
    found: Counter[tuple[float, str]] = Counter()
    for entry in sweep.entries:
        if entry.status != "finished" and entry.folder is not None:
            setting = diverged_setting(entry.folder)
            if setting is not None:
                found[setting] += 1
    texts = [
        f"{name} at {mantissa(rate)} ({plural(count, 'run')})"
        for (rate, name), count in sorted(found.items())
    ]
    more = len(texts) - SETTINGS
    return texts if more <= 0 else [*texts[:SETTINGS], f"{more} more settings"]


def diverged_setting(folder: Path) -> tuple[float, str] | None:
    """Learning rate and name of a diverged run; None of others and of damaged ones.

    Damaged runs are already listed among the runs that were left out.
    """
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
