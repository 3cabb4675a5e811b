"""LoRA-GA: the adapter's first step follows the gradient of the whole weight.

Full fine-tuning moves W along -G; an adapter moves s B A by a step that has rank 2r at most and
depends on its start (see `alignment`). LoRA-GA starts from the gradient's own singular vectors, so
that this step is the best approximation of G that its rank allows. That is an identity on the data
that G was taken from. Measured beside it: the same step on batches that no method has seen, which
is where training goes on.

Source: Wang, Yu & Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024,
arXiv 2407.05000, theorem 3.1.

    alignment   steps of rank 2r, their angle to the gradient, and the bound: pure
    settings    what can be told
    measuring   rows by model, layer, method and batch
    claims      what they say of the paper
    charts      tables and figures
"""

from __future__ import annotations

import pandas as pd

from experiments.papers.first_step import charts, claims
from experiments.papers.first_step.discussion import discussed
from experiments.papers.first_step.measuring import measure
from experiments.papers.first_step.settings import FirstStepSettings
from experiments.papers.reproduction import Findings, Paper
from experiments.papers.subject import DESCRIBED, short_name
from experiments.papers.tasks import described_data


def reproduce(settings: FirstStepSettings) -> Findings:
    """Measure every model, and judge over all of them."""
    measured = [measure(model, settings) for model in settings.models]
    rows = pd.concat([found for found, _ in measured], ignore_index=True)
    sizes = pd.concat([found for _, found in measured], ignore_index=True)
    return found_in(rows, sizes, settings)


def found_in(rows: pd.DataFrame, sizes: pd.DataFrame, settings: FirstStepSettings) -> Findings:
    """From rows to findings."""
    return Findings(
        claims=claims.claims_of(rows),
        setting=setting(rows, settings),
        tables=charts.tables(rows, sizes),
        figures=charts.figures(rows, sizes),
        discussion=discussed(rows, sizes),
    )


def setting(rows: pd.DataFrame, settings: FirstStepSettings) -> dict[str, str]:
    told = {}
    for model in settings.models:
        data = settings.data(model)
        layers = rows.loc[rows["model"] == short_name(model), "layer"].nunique()
        sets = "1 fresh set" if data.fresh == 1 else f"{data.fresh} fresh sets"
        blocks = "all blocks" if data.every == 1 else f"one block in {data.every}"
        told[short_name(model)] = (
            f"{DESCRIBED.get(model, model)}; {layers} layers, of {blocks}; "
            f"{described_data(model, size=data.batch_size, length=data.length)}; calibrated on "
            f"{data.calibration} sequences, {sets} of as many, of other films"
        )
    told["methods"] = (
        f"r = {settings.rank}, s = 1, the library’s options (lora_one: gamma = 8 √r, its authors’ "
        f"step at this s); seed {settings.seed}"
    )
    moved = [short_name(model) for model in settings.models if settings.data(model).moved]
    if len(moved) < len(settings.models):
        where = f"are measured on {', '.join(moved)} alone" if moved else "are left out"
        told["methods"] += f"; those that change the model’s function at step 0 {where}"
    told["the paper’s"] = "a theorem on one gradient; experiments on T5-base and Llama-2-7B"
    return told


PAPER = Paper(
    name="first_step",
    title="LoRA-GA: the first step",
    source="Wang, Yu & Li 2024, arXiv 2407.05000, theorem 3.1",
    question="Is LoRA-GA’s first step the closest to full fine-tuning’s, and does that hold on "
    "batches it was not calibrated on?",
    settings=FirstStepSettings,
    reproduce=reproduce,
)
