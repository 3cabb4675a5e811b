"""Which charts a report has, with their words: every one for which something was measured."""

from __future__ import annotations

from dataclasses import dataclass

import altair as alt
import pandas as pd

from .charts import Drawer
from .curves import held_out_losses, smoothed_losses
from .palette import marks, ordered
from .runs import Run
from .summary import Summarizer


@dataclass(frozen=True)
class Chart:
    """A drawing with the words that belong to it."""

    name: str
    title: str
    caption: str
    drawing: alt.LayerChart
    right: bool = False  # which column of a wide page


def draw(
    runs: list[Run],
    summarizer: Summarizer,
    run_table: pd.DataFrame,
    layer_table: pd.DataFrame,
    metric_table: pd.DataFrame,
    majority: float | None,
    metric: str,
) -> list[Chart]:
    """Every chart for which something was measured."""
    methods = ordered({run.method for run in runs})
    drawer = Drawer([r.arm for r in summarizer.rows()], marks(methods), summarizer.seeds, metric)
    scores = score_rows(summarizer)
    dots = run_table[["run_id", "arm", "method", "seed", "first_step_gradient_norm"]]
    dots = dots.assign(score=100 * run_table["score"])
    band = "Line: mean over seeds. Band: from the lowest to the highest seed"
    charts = [
        Chart(
            "score", f"{metric.capitalize()} per method",
            "Large dot: mean over seeds. Bar: 95 % bootstrap interval. Small circles: the runs.",
            drawer.score(scores, dots, None if majority is None else 100 * majority), right=True,
        ),
        Chart(
            "difference", "Difference to kaiming",
            "Paired over seeds and examples, with 95 % intervals. Hollow: a tie.",
            drawer.difference(scores),
        ),
    ]  # fmt: skip
    if scores["difference"].isna().all():
        charts.pop()
    curves, window = smoothed_losses(metric_table)
    if len(curves):
        smooth = f", each run's losses averaged over {window} steps" if window > 1 else ""
        charts.insert(0, Chart(
            "loss", "Training loss", f"{band}{smooth}.", drawer.loss(curves, "training loss"),
        ))  # fmt: skip
    held_out = held_out_losses(metric_table)
    if len(held_out):
        charts.insert(1, Chart(
            "validation", "Validation loss", f"{band}.",
            drawer.loss(held_out, "validation loss", "validation"),
        ))  # fmt: skip
    if (scores["init_seconds"] > 0).any():
        charts.append(Chart(
            "cost", "What the start costs, what it brings",
            "Seconds to initialize, calibration included, on a logarithmic axis. "
            "Bars: 95 % intervals of the score.",
            drawer.cost(scores),
        ))  # fmt: skip
    gradients = dots["first_step_gradient_norm"].dropna()
    if len(gradients):
        log = gradients.min() > 0 and gradients.max() > 20 * gradients.min()
        charts.append(Chart(
            "gradient", "Gradient norm at the first step",
            "A tick per run, a dot for the mean." + (" Logarithmic axis." if log else ""),
            drawer.strip(dots, "first_step_gradient_norm", "gradient norm", log),
        ))  # fmt: skip
    return charts + layer_charts(drawer, layer_table)


def layer_charts(drawer: Drawer, layer_table: pd.DataFrame) -> list[Chart]:
    if layer_table.empty:
        return []
    wanted = ["relative_norm", "captured_energy", "error", "rank", "out_features", "in_features"]
    table = layer_table.reindex(columns=[*layer_table.columns.union(wanted, sort=False)])
    table["shape"] = table["out_features"].astype(str) + " × " + table["in_features"].astype(str)
    charts = []
    if table["relative_norm"].notna().any():
        columns = ["arm", "method", "seed", "layer", "relative_norm"]
        charts.append(Chart(
            "norm", "Size of the start, norm of sBA / norm of W",
            "A tick per layer and seed, a dot for the mean. Zero where B starts at zero.",
            drawer.strip(table[columns], "relative_norm", "norm of sBA / norm of W", log=False),
            right=True,
        ))  # fmt: skip
    if table["captured_energy"].notna().any():
        charts.append(Chart(
            "energy", "Captured energy per layer",
            "‖W P‖² / ‖W‖², P the projection on the rows of the initial A: the share of the weight "
            "in the directions where the adapter begins. Mean over seeds.",
            drawer.layers(table, "captured_energy", "captured energy"), right=True,
        ))  # fmt: skip
    return charts


def score_rows(summarizer: Summarizer) -> pd.DataFrame:
    """The rows of every choice of seeds that the page offers, scores in per cent."""
    nan = float("nan")
    return pd.DataFrame(
        {
            "arm": row.arm,
            "method": row.method,
            "seeds": ",".join(map(str, subset)),
            "score": 100 * row.score.estimate,
            "low": 100 * row.score.low,
            "high": 100 * row.score.high,
            "difference": 100 * row.difference.estimate if row.difference else nan,
            "difference_low": 100 * row.difference.low if row.difference else nan,
            "difference_high": 100 * row.difference.high if row.difference else nan,
            "verdict": row.verdict,
            "init_seconds": nan if row.init_seconds is None else row.init_seconds,
        }
        for subset in summarizer.seed_subsets()
        for row in summarizer.rows(subset)
    )
