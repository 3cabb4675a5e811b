"""The tables that the charts and the page's list of runs are drawn from, kept small.

Curves and layers are those of the chosen settings only. Numbers are rounded to what a chart can
show. Charts share tables by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .arms import without_rank
from .frames import END, short_names
from .fronts import fronts
from .matrix import Matrix
from .power import Power, curve
from .spectra import spectra
from .statistics import seed_interval
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
LOGGED = {
    "loss": ("train", "loss"),
    "validation": ("validation", "loss"),
    "gradients": ("train", "grad_norm"),
    "update": ("update", "update_size"),
}
"""By chart, the split and the column of the logged rows that it shows."""
POINTS = 100  # of a curve


@dataclass(frozen=True)
class Views:
    """The tables by name, and what their captions need.

    Attributes:
        curve: the quantity of the robustness curve: "score" or "validation_score".
        forgetting: the kind of forgetting that the runs measured.
    """

    tables: dict[str, pd.DataFrame]
    curve: str
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
    learned = curve_quantity(runs)
    kind = "; ".join(runs["forgetting_kind"].dropna().unique())
    arms = list(dict.fromkeys(row.arm for row in summarizer.all_rows()))
    all_points = points(runs, summarizer.quantity, learned)
    tables = {
        "runs": all_points,
        "rows": score_rows(summarizer),
        "robustness": rate_curves(all_points),
        **{
            name: step_curves(metrics, chosen, split, value)
            for name, (split, value) in LOGGED.items()
        },
        "layers": layer_values(layers, chosen),
        "verdicts": verdicts(matrix, chosen),
        "power": pd.concat([curve(power) for power in powers]) if powers else pd.DataFrame(),
        "fronts": fronts(all_points),
        "spectra": spectra(summarizer.runs, arms, summarizer.problems),
    }
    return Views({name: rounded(frame) for name, frame in tables.items()}, learned, kind)


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
    """One row per arm at its chosen setting, with scores in percent."""
    return pd.DataFrame(
        {
            "arm": row.arm,
            "method": row.method,
            "rank": 0.0 if np.isnan(row.choice.rank) else row.choice.rank,
            "task": row.choice.task,
            "learning_rate": row.choice.learning_rate,
            "seeds": ",".join(map(str, row.seeds)),
            "score": 100 * row.score.estimate,
            "low": 100 * row.score.low,
            "high": 100 * row.score.high,
            "series": without_rank(row.arm),
            "init_seconds": row.measures["init_seconds"],
        }
        for row in summarizer.all_rows()
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


def rate_curves(points: pd.DataFrame) -> pd.DataFrame:
    """The mean over seeds at each learning rate, with Student's t interval from three seeds on."""
    known = points[points["curve"].notna()]
    keys = ["arm", "method", "rank", "task", "learning_rate", "best"]
    rows = []
    for key, values in known.groupby(keys, sort=False)["curve"]:
        mean = seed_interval(values.to_numpy())
        rows.append((*key, mean.estimate, mean.low, mean.high, len(values)))
    return pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "seeds"])


def step_curves(
    metrics: pd.DataFrame, chosen: pd.DataFrame, split: str, value: str
) -> pd.DataFrame:
    """Mean, lowest and highest seed of a logged value by step, at the chosen settings.

    Of more than `POINTS` logged steps, a point averages the steps near it.
    """
    keys = ["arm", "method", "rank", "task"]
    columns = [*keys, "step", "mean", "lowest", "highest", "seeds"]
    if metrics.empty or value not in metrics:
        return pd.DataFrame(columns=columns)
    rows = metrics[(metrics["split"] == split) & metrics[value].notna()]
    rows = rows[["run_id", "step", value]].merge(chosen.reset_index(drop=True), on="run_id")
    if rows.empty:
        return pd.DataFrame(columns=columns)
    steps, place = np.unique(rows["step"], return_inverse=True)
    width = -(-len(steps) // POINTS)
    middle = np.minimum(place // width * width + width // 2, len(steps) - 1)
    by_run = rows.assign(step=steps[middle]).groupby(["run_id", *keys, "step"])[value].mean()
    over_seeds = by_run.groupby([*keys, "step"]).agg(["mean", "min", "max", "count"])
    return over_seeds.reset_index().set_axis(columns, axis=1)


def layer_values(layers: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """One row per layer of each chosen setting: means over seeds.

    `layer_rank` may differ between layers, as in EVA.
    """
    keys, values = (
        ["arm", "method", "rank", "task", "layer", "shape"],
        ["layer_rank", "error", *LAYER],
    )
    layers = layers[layers["run_id"].isin(chosen["run_id"])] if len(layers) else layers
    if layers.empty:
        return pd.DataFrame(columns=[*keys, *values])
    layers = layers.rename(columns={"rank": "layer_rank"})
    layers = layers.drop(columns=["method", "seed"]).merge(chosen.reset_index(drop=True))
    known = list(dict.fromkeys(layers["name"]))
    short = dict(zip(known, short_names(known), strict=True))
    sides = layers.reindex(columns=["out_features", "in_features"])
    shape = [f"{rows:g} × {columns:g}" for rows, columns in sides.itertuples(index=False)]
    layers = layers.assign(layer=layers["name"].map(short), shape=shape)
    numbers = layers.reindex(columns=[*keys, *values]).astype(dict.fromkeys(values, float))
    return numbers.groupby(keys, sort=False)[values].mean().reset_index()


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
