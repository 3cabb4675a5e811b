"""What the rows of the first step say in a few sentences, with their figures."""

from __future__ import annotations

import pandas as pd

from experiments.papers.first_step.measuring import CALIBRATION, FRESH, SUBJECT, TOGETHER


def discussed(rows: pd.DataFrame, sizes: pd.DataFrame) -> list[str]:
    return [
        *(fitted_share(model, rows, sizes) for model in rows["model"].unique()),
        "All steps are compared at the length that suits each best: only directions count here, "
        "neither the pace that a method’s norms set nor where a longer training ends.",
    ]


def fitted_share(model: str, rows: pd.DataFrame, sizes: pd.DataFrame) -> str:
    """How much of the squared gradient LoRA-GA's step holds, on its data and on others."""
    own = rows[(rows["model"] == model) & (rows["method"] == SUBJECT)]
    held = {data: 1 - own.loc[own["data"] == data, "error"] ** 2 for data in (CALIBRATION, FRESH)}
    possible = 1 - own.loc[own["data"] == FRESH, "bound"] ** 2
    most = sizes[(sizes["model"] == model) & (sizes["data"] == TOGETHER)]
    most = most[most["size"] == most["size"].max()]
    mean = 1 - most["error"] ** 2
    return (
        f"{model}: LoRA-GA’s step holds {held[CALIBRATION].mean():.0%} of the squared gradient it "
        f"was calibrated on and {held[FRESH].mean():.0%} of a fresh batch’s, of which a step of "
        f"that rank could hold {possible.mean():.0%}. Calibrated on {most['size'].iloc[0]} "
        f"sequences it holds {mean.mean():.0%} of the mean gradient of all fresh ones."
    )
