"""What a reader must know before believing a figure."""

from __future__ import annotations

import pandas as pd

from .choices import TEST, Choice
from .palette import BASELINE
from .runs import Problem
from .summary import Row

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


def setting_warnings(different: dict[str, list]) -> list[str]:
    """One line per setting that a fair comparison would hold equal and this one does not."""
    return [
        f"The runs differ in {key}: " + ", ".join("missing" if v is None else str(v) for v in shown)
        + (f" and {len(values) - len(shown)} more" if len(values) > len(shown) else "")
        for key, values in different.items()
        for shown in [values[:6]]
    ]  # fmt: skip


def empty_columns(*frames: pd.DataFrame) -> list[str]:
    """Measured quantities that are missing everywhere, or zero everywhere: both look like bugs."""
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
    """Scores that tell nothing apart, most often because the task is too hard or too easy."""
    scores = runs["score"].dropna()
    if len(scores) < 2 or scores.nunique() > 1:
        return []
    return [
        f"Every run has the same score, {100 * scores.iloc[0]:.1f} %: it tells no methods and no "
        "learning rates apart. Look at the losses, or train for longer."
    ]


def shared_seeds(runs: pd.DataFrame) -> list[Problem]:
    """Runs of one setting with the same seed: each counts as a seed of its own, which it is not."""
    counts = runs.groupby(["task", "arm", "learning_rate", "seed"], dropna=False).size()
    return [
        Problem(arm, f"{count} runs have seed {seed}; each is counted", fatal=False)
        for (_, arm, _, seed), count in counts[counts > 1].items()
    ]


def choice_warnings(runs: pd.DataFrame, choices: list[Choice]) -> list[str]:
    """What weakens the choice of the settings that the methods are judged at."""
    warnings = []
    missing = sorted(set(runs["method"]) - {choice.method for choice in choices})
    if missing:
        warnings.append(
            f"The protocol has not chosen a setting for {', '.join(missing)}: it takes no part in "
            "the comparison yet."
        )
    edges = [f"{c.arm} ({c.learning_rate:g})" for c in choices if c.at_edge]
    if edges:
        warnings.append(
            "The chosen learning rate is the lowest or the highest that was tried, so the best may "
            f"lie beyond: {', '.join(edges)}."
        )
    if any(choice.by == TEST and choice.rates > 1 for choice in choices):
        warnings.append(
            "The learning rates were chosen by the very test scores that are shown, because no "
            "validation score was recorded: the scores are too high by what the best of several "
            "tries gains by luck."
        )
    tried = {choice.rates for choice in choices}
    if len(tried) > 1 and min(tried) == 1:
        alone = ", ".join(c.arm for c in choices if c.rates == 1)
        warnings.append(
            f"Some methods were tuned and others not: one learning rate only for {alone}. "
            "This is no fair comparison."
        )
    return warnings


def baseline_warnings(rows: list[Row], majority: float | None) -> list[str]:
    """A comparison shows nothing where there is no baseline, or it has learned nothing."""
    baselines = [row for row in rows if row.method == BASELINE]
    if not baselines:
        return [f"No run of {BASELINE}: there is no baseline to compare with."]
    best = max(row.score.estimate for row in baselines)
    if majority is not None and best < majority + CLEARLY_ABOVE_MAJORITY:
        points = 100 * (best - majority)
        return [
            f"{BASELINE} is {points:+.1f} points from always answering the majority class: "
            "with so little learned, differences between methods mean little."
        ]
    return []
