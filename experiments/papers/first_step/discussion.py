"""What the rows of the first step say in a few sentences, with their figures."""

from __future__ import annotations

import pandas as pd

from experiments.papers.first_step.measuring import CALIBRATION, FRESH, SUBJECT


def discussed(rows: pd.DataFrame, sizes: pd.DataFrame | None) -> list[str]:
    said = [
        f"{model}: {fitted_share(rows[rows['model'] == model])}" for model in rows["model"].unique()
    ]
    return [
        *said,
        "All steps are compared at the length that suits each best: only directions count here, "
        "neither the pace that a method’s norms set nor where a longer training ends.",
    ]


def fitted_share(rows: pd.DataFrame) -> str:
    """How much of the squared gradient LoRA-GA's step holds, on its data and on others."""
    own = rows[rows["method"] == SUBJECT]
    held = {data: 1 - own.loc[own["data"] == data, "error"] ** 2 for data in (CALIBRATION, FRESH)}
    possible = 1 - own.loc[own["data"] == FRESH, "bound"] ** 2
    return (
        f"LoRA-GA’s step holds {held[CALIBRATION].mean():.0%} of the squared gradient it was "
        f"calibrated on and {held[FRESH].mean():.0%} of a fresh batch’s, of which a step of that "
        f"rank could hold {possible.mean():.0%}; the difference is the calibration batch’s own."
    )
