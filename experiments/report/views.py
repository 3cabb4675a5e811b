"""What the charts and the page's list of runs draw from: few tables, small enough to travel.

Curves and layers are those of the chosen settings only; everything is rounded to what a chart can
show. A table is shared by all charts that name it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .arms import without_rank
from .choices import Choice
from .curves import held_out, smoothed_training, updates
from .frames import END, short_names
from .spectra import spectra
from .statistics import interquartile_mean
from .summary import Row, Summarizer

RUN = ("run_id", "arm", "method", "seed", "rank", "task")
MEASURED = (
    "init_seconds", "train_seconds", "output_gap", "relative_norm", "first_step_gradient_norm",
    "loss_test", *END,
)  # fmt: skip
LAYER = (
    "captured_energy", "relative_norm", "update_size", "intruder_dimensions", "angle_A", "angle_B",
)  # fmt: skip
DIGITS = 5


@dataclass(frozen=True)
class Views:
    """The tables by name, and what the whole report shares.

    Attributes:
        curve: the quantity of the robustness curve: "score" or "validation_score".
        forgetting: what the runs say that their forgetting is.
        smoothing: width in logged steps of the window that losses were averaged over.
    """

    tables: dict[str, pd.DataFrame]
    curve: str
    smoothing: int
    forgetting: str


def make_views(
    runs: pd.DataFrame,
    layers: pd.DataFrame,
    metrics: pd.DataFrame,
    summarizer: Summarizer,
) -> Views:
    """All tables of the charts.

    Args:
        runs: every run, with `arm`, `task` and `best`.
        layers, metrics: of every run; those of the chosen settings are taken.
    """
    chosen = summarizer.runs[list(RUN)].assign(rank=summarizer.runs["rank"].fillna(0))
    training, window = smoothed_training(metrics, chosen)
    curve = curve_quantity(runs)
    kind = "; ".join(runs["forgetting_kind"].dropna().unique())
    arms = list(dict.fromkeys(row.arm for row in summarizer.all_rows()))
    tables = {
        "runs": points(runs, summarizer.quantity, curve),
        "rows": score_rows(summarizer),
        "training": training,
        "validation": held_out(metrics, chosen),
        "updates": updates(metrics, chosen),
        "layers": layer_values(layers, chosen),
        "tasks": task_means(summarizer),
        "spectra": spectra(summarizer.runs, arms, summarizer.problems),
    }
    return Views({name: rounded(frame) for name, frame in tables.items()}, curve, window, kind)


def curve_quantity(runs: pd.DataFrame) -> str:
    """One quantity for a whole curve: the score if every run has it, else the validation score."""
    return "score" if runs["tested"].all() else "validation_score"


def points(runs: pd.DataFrame, quantity: str, curve: str) -> pd.DataFrame:
    """One row a run: `score` and `curve` in per cent, what was measured, where it stands."""
    frame = runs[[*RUN, "learning_rate", "best", *MEASURED]]
    return frame.assign(
        score=100 * runs[quantity], curve=100 * runs[curve], rank=runs["rank"].fillna(0)
    )


def score_rows(summarizer: Summarizer) -> pd.DataFrame:
    """The rows of every choice of seeds that the page offers, scores in per cent."""
    return pd.DataFrame(
        {
            "arm": row.arm,
            "method": row.method,
            "rank": 0.0 if np.isnan(row.choice.rank) else row.choice.rank,
            "task": task,
            "learning_rate": row.choice.learning_rate,
            "seeds": ",".join(map(str, subset)),
            **in_percent(row),
            "verdict": row.verdict,
            "series": without_rank(row.arm),
            "init_seconds": row.measured["init_seconds"],
        }
        for task in summarizer.tasks
        for subset in summarizer.seed_subsets()
        for row in summarizer.rows(task, subset)
    )


def in_percent(row: Row) -> dict[str, float]:
    nan = float("nan")
    score, other = row.score, row.difference
    return {
        "score": 100 * score.estimate,
        "low": 100 * score.low,
        "high": 100 * score.high,
        "difference": 100 * other.estimate if other else nan,
        "difference_low": 100 * other.low if other else nan,
        "difference_high": 100 * other.high if other else nan,
    }


def layer_values(layers: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """One row per layer of each chosen run; `layer_rank` is the layer's own, as EVA sets it."""
    names = [*RUN, "layer", "shape", "layer_rank", "error", *LAYER]
    layers = layers[layers["run_id"].isin(chosen["run_id"])] if len(layers) else layers
    if layers.empty:
        return pd.DataFrame(columns=names)
    layers = layers.rename(columns={"rank": "layer_rank"})
    layers = layers.drop(columns=["method", "seed"]).merge(chosen.reset_index(drop=True))
    known = list(dict.fromkeys(layers["name"]))
    short = dict(zip(known, short_names(known), strict=True))
    layers = layers.reindex(columns=[*layers, *(n for n in names if n not in layers)])
    shape = [f"{o:g} × {i:g}" for o, i in zip(*sides(layers), strict=True)]
    return layers.assign(layer=layers["name"].map(short), shape=shape)[names]


def sides(layers: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    missing = pd.Series(float("nan"), index=layers.index)
    return layers.get("out_features", missing), layers.get("in_features", missing)


def task_means(summarizer: Summarizer) -> pd.DataFrame:
    """Interquartile mean over tasks and seeds of every arm that all tasks have; else no rows."""
    tasks = summarizer.tasks
    by_arm: dict[str, dict[str, Choice]] = {}
    for choice in summarizer.choices:
        by_arm.setdefault(choice.arm, {})[choice.task] = choice
    rows = []
    for arm, by_task in by_arm.items():
        if len(tasks) < 2 or len(by_task) < len(tasks):
            continue
        scores = [
            summarizer.runs.loc[list(by_task[task].runs), summarizer.quantity].to_numpy()
            for task in tasks
        ]
        mean = interquartile_mean(scores)
        choice = by_task[tasks[0]]
        rows.append(
            {
                "arm": arm, "method": choice.method, "score": 100 * mean.estimate,
                "rank": 0.0 if np.isnan(choice.rank) else choice.rank,
                "low": 100 * mean.low, "high": 100 * mean.high, "tasks": len(tasks),
                "runs": sum(map(len, scores)),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """Floats to five significant digits: three times as short as JSON, and no chart shows more."""
    frame = frame.reset_index(drop=True)
    for name in frame.select_dtypes("float"):
        values = frame[name].to_numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            place = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.abs(values))))
            short = np.round(values * place) / place
        frame[name] = np.where(np.isfinite(short), short, values)
    return frame
