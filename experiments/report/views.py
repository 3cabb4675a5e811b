"""The tables that the charts and the page's list of runs are drawn from, kept small.

Curves and layers are those of the chosen settings only. Numbers are rounded to what a chart can
show. Charts share tables by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .arms import without_rank
from .choices import Choice
from .frames import END, short_names
from .fronts import fronts
from .matrix import Matrix
from .power import Power, curve
from .spectra import spectra
from .statistics import interquartile_mean
from .summary import Summarizer

RUN = ("run_id", "arm", "method", "seed", "rank", "task")
MEASURED = (
    "init_seconds", "train_seconds", "output_gap", "relative_norm", "first_step_gradient_norm",
    "loss_test", *END,
)  # fmt: skip
LAYER = (
    "captured_energy", "relative_norm", "update_size", "intruder_dimensions", "angle_A", "angle_B",
)  # fmt: skip
DIGITS = 5
POINTS, FEWER_POINTS = 120, 60
MANY_RUNS = 60


@dataclass(frozen=True)
class Views:
    """The tables by name, and what their captions need.

    Attributes:
        curve: the quantity of the robustness curve: "score" or "validation_score".
        forgetting: the kind of forgetting that the runs measured.
        smoothing: width of the window over which losses are averaged, in logged steps.
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
    matrix: Matrix,
    powers: list[Power],
) -> Views:
    """All tables of the charts.

    Args:
        runs: every run, with `arm`, `task` and `best`.
        layers, metrics: of every run.
    """
    chosen = summarizer.runs[list(RUN)].assign(rank=summarizer.runs["rank"].fillna(0))
    training, window = smoothed_training(metrics, chosen)
    learned = curve_quantity(runs)
    kind = "; ".join(runs["forgetting_kind"].dropna().unique())
    arms = list(dict.fromkeys(row.arm for row in summarizer.all_rows()))
    tables = {
        "runs": points(runs, summarizer.quantity, learned),
        "rows": score_rows(summarizer),
        "training": training,
        "validation": held_out(metrics, chosen),
        "updates": updates(metrics, chosen),
        "layers": layer_values(layers, chosen),
        "tasks": task_means(summarizer),
        "verdicts": verdicts(matrix, chosen),
        "power": pd.concat([curve(power) for power in powers]) if powers else pd.DataFrame(),
        "fronts": fronts(points(runs, summarizer.quantity, learned)),
        "spectra": spectra(summarizer.runs, arms, summarizer.problems),
    }
    return Views({name: rounded(frame) for name, frame in tables.items()}, learned, window, kind)


def curve_quantity(runs: pd.DataFrame) -> str:
    """The score if every run has it, else the validation score."""
    return "score" if runs["tested"].all() else "validation_score"


def points(runs: pd.DataFrame, quantity: str, curve: str) -> pd.DataFrame:
    """One row per run: its measures, with `score` and `curve` in percent."""
    frame = runs[[*RUN, "learning_rate", "best", *MEASURED]]
    return frame.assign(
        score=100 * runs[quantity], curve=100 * runs[curve], rank=runs["rank"].fillna(0)
    )


def score_rows(summarizer: Summarizer) -> pd.DataFrame:
    """The rows of every choice of seeds that the page offers, with scores in percent."""
    return pd.DataFrame(
        {
            "arm": row.arm,
            "method": row.method,
            "rank": 0.0 if np.isnan(row.choice.rank) else row.choice.rank,
            "task": task,
            "learning_rate": row.choice.learning_rate,
            "seeds": ",".join(map(str, subset)),
            "score": 100 * row.score.estimate,
            "low": 100 * row.score.low,
            "high": 100 * row.score.high,
            "series": without_rank(row.arm),
            "init_seconds": row.measures["init_seconds"].estimate,
        }
        for task in summarizer.tasks
        for subset in summarizer.seed_subsets()
        for row in summarizer.rows(task, subset)
    )


def verdicts(matrix: Matrix, chosen: pd.DataFrame) -> pd.DataFrame:
    """One row per judgement: in the quantity's unit, factors as they are."""
    arms = chosen.drop_duplicates(["task", "arm"]).set_index(["task", "arm"])
    return pd.DataFrame(
        {
            "arm": one.arm, "task": one.task, "quantity": one.quantity.name,
            "method": arms.loc[(one.task, one.arm), "method"],
            "rank": arms.loc[(one.task, one.arm), "rank"], "factor": one.factor,
            **{
                key: value * one.quantity.scale
                for key, value in (("value", one.value), ("low", one.low), ("high", one.high))
            },
            "verdict": one.verdict,
        }
        for one in matrix.judgements
        if np.isfinite(one.value)
    )  # fmt: skip


def smoothed_training(metrics: pd.DataFrame, chosen: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Each run's training losses and gradient norms, averaged over a window and thinned.

    The window is centered and a twentieth of the logged steps wide (odd, at least 1). It shrinks
    at both ends, so that the first and the last point are not shifted.

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
    """Validation losses; empty for fewer than two steps."""
    rows = of_split(metrics, chosen, "validation", ["loss"])
    return rows if rows["step"].nunique() > 1 else rows.iloc[:0]


def updates(metrics: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """‖ΔW‖ / ‖W‖ over all adapted layers at the measured steps."""
    return of_split(metrics, chosen, "update", ["update_size"])


def of_split(
    metrics: pd.DataFrame, chosen: pd.DataFrame, split: str, values: list[str]
) -> pd.DataFrame:
    """The rows of one split that have the first of `values`, with the columns of `chosen`."""
    columns = [*chosen.columns, "step", *values]
    if metrics.empty or values[0] not in metrics:
        return pd.DataFrame(columns=columns)
    rows = metrics[(metrics["split"] == split) & metrics[values[0]].notna()]
    rows = rows.reindex(columns=["run_id", "step", *values])
    return rows.merge(chosen.reset_index(drop=True), on="run_id")[columns]


def layer_values(layers: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """One row per layer of each chosen run. `layer_rank` may differ between layers, as in EVA."""
    names = [*RUN, "layer", "shape", "layer_rank", "error", *LAYER]
    layers = layers[layers["run_id"].isin(chosen["run_id"])] if len(layers) else layers
    if layers.empty:
        return pd.DataFrame(columns=names)
    layers = layers.rename(columns={"rank": "layer_rank"})
    layers = layers.drop(columns=["method", "seed"]).merge(chosen.reset_index(drop=True))
    known = list(dict.fromkeys(layers["name"]))
    short = dict(zip(known, short_names(known), strict=True))
    layers = layers.reindex(columns=[*layers, *(n for n in names if n not in layers)])
    sides = layers.reindex(columns=["out_features", "in_features"])
    shape = [f"{rows:g} × {columns:g}" for rows, columns in sides.itertuples(index=False)]
    return layers.assign(layer=layers["name"].map(short), shape=shape)[names]


def task_means(summarizer: Summarizer) -> pd.DataFrame:
    """Interquartile mean over tasks and seeds, for arms that all of several tasks have."""
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
    """Floats with five significant digits, which makes the JSON three times shorter."""
    frame = frame.reset_index(drop=True)
    for name in frame.select_dtypes("float"):
        values = frame[name].to_numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            place = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.abs(values))))
            short = np.round(values * place) / place
        frame[name] = np.where(np.isfinite(short), short, values)
    return frame
