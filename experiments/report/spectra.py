"""The spectra of the chosen runs, read from their folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from .frames import short_names
from .runs import Problem, read_json
from .validation import is_text

LAYERS, DIRECTIONS = 12, 64
COLUMNS = ("arm", "method", "rank", "task", "order", "layer", "index", "value", "taken")


def spectra(chosen: pd.DataFrame, arms: list[str], problems: list[Problem]) -> pd.DataFrame:
    """One row per singular direction of a layer, for the first seed of each chosen setting.

    There are at most `LAYERS` layers, evenly spread, and the leading `DIRECTIONS` of each.
    `value` is the singular value over the first. `taken` is the share that the start uses.

    Args:
        chosen: the chosen runs, with `arm`, `task`, `rank` and `folder`.
        arms: in the report's order.
        problems: what cannot be read is added to it.
    """
    pieces = []
    for run in chosen.sort_values("seed").drop_duplicates(["task", "arm"]).itertuples():
        path = Path(run.folder) / "spectra.json"
        if not path.exists():
            continue
        try:
            pieces += layer_pieces(run, read_json(path)["layers"], arms.index(run.arm))
        except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
            label = f"{run.method}, seed {run.seed} ({run.run_id})"
            reason = f"spectra.json cannot be read: {error}"
            problems.append(Problem(label, reason, fatal=False))
    if not pieces:
        return pd.DataFrame(columns=list(COLUMNS))
    frame = pd.concat(pieces, ignore_index=True)
    names = list(dict.fromkeys(frame["layer"]))
    return frame.assign(layer=frame["layer"].map(dict(zip(names, short_names(names), strict=True))))


def layer_pieces(run, layers: list[dict], order: int) -> list[pd.DataFrame]:
    places = np.unique(np.linspace(0, len(layers) - 1, LAYERS).round().astype(int))
    pieces = []
    for layer in (layers[place] for place in places):
        values = np.asarray(layer["singular_values"], dtype=float)[:DIRECTIONS]
        # None: a start with a zero A uses nothing.
        shares = layer["taken"] or [0.0] * len(layer["singular_values"])
        taken = np.asarray(shares, dtype=float)[:DIRECTIONS]
        if not is_text(layer["name"]) or not np.isfinite([*values, *taken]).all():
            raise ValueError("a layer has no name, or values that are not finite")
        if len(values) == 0 or len(values) != len(taken) or not values[0] > 0:
            raise ValueError(
                f"{layer['name']} has {len(values)} singular values and {len(taken)} shares"
            )
        rank = 0.0 if np.isnan(run.rank) else run.rank
        pieces.append(pd.DataFrame({
            "arm": run.arm, "method": run.method, "rank": rank, "task": run.task, "order": order,
            "layer": layer["name"], "index": np.arange(1, len(values) + 1),
            "value": values / values[0], "taken": taken,
        }))  # fmt: skip
    return pieces
