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

MEASURED = {
    "score": "the score",
    "init_seconds": "the initialization's seconds",
    "first_step_gradient_norm": "the first step's gradient norm",
    "trainable_parameters": "the trainable parameters",
    "captured_energy": "the captured energy",
    "relative_norm": "‖sBA‖ / ‖W‖",
    "output_gap": "the output gap at step 0",
    "loss": "the loss",
}
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


def empty_columns(*frames: pd.DataFrame) -> list[str]:
    """Measured quantities that are missing or zero in every run: both look like bugs."""
    warnings = []
    for column, label in MEASURED.items():
        if column == "score" and frames[0]["validation_score"].notna().any():
            continue
        frame = next((f for f in frames if column in f), None)
        values = pd.Series(dtype=float) if frame is None else frame[column].dropna()
        if values.empty:
            warnings.append(f"No run recorded {label}.")
        elif column != "score" and (pd.to_numeric(values) == 0).all():
            warnings.append(f"In every run {label} is exactly zero: was it measured?")
    return warnings


def equal_scores(runs: pd.DataFrame) -> list[str]:
    """Equal scores everywhere compare nothing. Most often the task is too hard or too easy."""
    scores = runs["score"].dropna()
    if len(scores) < 2 or scores.nunique() > 1:
        return []
    return [
        f"Every run has the same score, {100 * scores.iloc[0]:.1f} %. It does not distinguish "
        "methods or learning rates. Look at the losses, or train for longer."
    ]


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
    edges = [f"{c.arm} ({c.learning_rate:g})" for c in choices if c.at_edge]
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
    """A comparison means little without a baseline, or with one that has learned nothing."""
    baselines = [row for row in rows if row.is_baseline]
    if not baselines:
        return [f"No run of {BASELINE}: the comparison has no baseline."]
    best = max(row.score.estimate for row in baselines)
    if majority is not None and best < majority + CLEARLY_ABOVE_MAJORITY:
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
