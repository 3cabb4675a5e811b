"""What was logged while the chosen runs trained, made fit for drawing."""

from __future__ import annotations

import pandas as pd

POINTS, FEWER_POINTS = 120, 60
MANY_RUNS = 60


def smoothed_training(metrics: pd.DataFrame, chosen: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Each run's training losses and gradient norms, averaged over a window and thinned.

    The window is centred and a twentieth of the logged steps wide (odd, at least 1); at both
    ends it shrinks to what there is, so that the first point is not dragged along.

    Returns:
        The rows, and the window's width in logged rows.
    """
    training = of_split(metrics, chosen, "train", ["loss", "grad_norm"])
    if training.empty:
        return training, 1
    training = training.sort_values(["run_id", "step"], ignore_index=True)
    by_run = training.groupby("run_id", sort=False)
    logged = int(by_run["step"].size().median())
    window = max(1, logged // 20) | 1
    for column in ("loss", "grad_norm"):
        smooth = by_run[column].rolling(window, center=True, min_periods=1).mean()
        training[column] = smooth.to_numpy()
    count = POINTS if by_run.ngroups <= MANY_RUNS else FEWER_POINTS
    # The same grid of steps for all seeds, so that they can be averaged.
    spacing = training["step"].diff().where(training["run_id"].eq(training["run_id"].shift()))
    grid = max(1, int(spacing.median() if spacing.notna().any() else 1)) * -(-logged // count)
    kept = (training["step"] - by_run["step"].transform("min")) % grid == 0
    return training[kept], window


def held_out(metrics: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """Validation losses as they were measured; empty unless there are two steps or more."""
    rows = of_split(metrics, chosen, "validation", ["loss"])
    return rows if rows["step"].nunique() > 1 else rows.iloc[:0]


def updates(metrics: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """‖ΔW‖ / ‖W‖ over all adapted layers, at the steps where it was measured."""
    return of_split(metrics, chosen, "update", ["update_size"])


def of_split(
    metrics: pd.DataFrame, chosen: pd.DataFrame, split: str, values: list[str]
) -> pd.DataFrame:
    """The rows of one split that have the first of `values`, with what names their run."""
    columns = [*chosen.columns, "step", *values]
    if metrics.empty or values[0] not in metrics:
        return pd.DataFrame(columns=columns)
    rows = metrics[(metrics["split"] == split) & metrics[values[0]].notna()]
    rows = rows.reindex(columns=["run_id", "step", *values])
    return rows.merge(chosen.reset_index(drop=True), on="run_id")[columns]
