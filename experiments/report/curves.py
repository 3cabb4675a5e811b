"""Loss against step, made fit for drawing."""

from __future__ import annotations

import pandas as pd

POINTS = 120


def smoothed_losses(metrics: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Each run's training losses, averaged over a window and thinned to `POINTS` steps or so.

    The window is centred and a twentieth of the logged steps wide (odd, at least 1); at both
    ends it shrinks to what there is, so that the first point is not dragged along.

    Returns:
        The frame (`run_id, arm, method, seed, step, loss`) and the window's width in logged rows.
    """
    if metrics.empty or "split" not in metrics:
        return pd.DataFrame(columns=["run_id", "arm", "method", "seed", "step", "loss"]), 1
    training = metrics[(metrics["split"] == "train") & metrics["loss"].notna()]
    logged = int(training.groupby("run_id")["step"].size().median()) if len(training) else 1
    window = max(1, logged // 20) | 1
    stride = max(1, -(-logged // POINTS))
    pieces = []
    for _, run in training.sort_values("step").groupby("run_id", sort=False):
        smooth = run["loss"].rolling(window, center=True, min_periods=1).mean()
        piece = run[["run_id", "arm", "method", "seed", "step"]].assign(loss=smooth)
        pieces.append(piece[(piece["step"] - piece["step"].min()) % _grid(piece, stride) == 0])
    return pd.concat(pieces, ignore_index=True) if pieces else training, window


def held_out_losses(metrics: pd.DataFrame) -> pd.DataFrame:
    """Validation losses as they were measured; empty unless some run has two or more."""
    columns = ["run_id", "arm", "method", "seed", "step", "loss"]
    if metrics.empty or "split" not in metrics:
        return pd.DataFrame(columns=columns)
    held_out = metrics[(metrics["split"] == "validation") & metrics["loss"].notna()]
    return held_out[columns] if held_out["step"].nunique() > 1 else held_out[columns].iloc[:0]


def _grid(run: pd.DataFrame, stride: int) -> int:
    """Distance in steps between kept points: the same grid for all seeds, so they average."""
    spacing = run["step"].diff().dropna()
    return max(1, int(spacing.median() if len(spacing) else 1) * stride)
