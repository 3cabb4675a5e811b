"""OSRM: the loss of two merged adapters, with directions that the other task does not use.

An adapter is trained for each of two tasks. Both updates are added to the original weights. An
adapter disturbs the other task less if its A maps that task's inputs to almost zero. OSRM starts
from such an A. The control has random orthonormal rows, which have the same size.

The tasks are film reviews (fresh or rotten) and sums of three numbers (above 50 or not). Each task
has its own head, trained alone on the original model.

Source: Zhang & Zhou 2025, arXiv 2505.22934.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import Calibration
from lora_init.progress import tracked

from ..data import Labelled, chain_sum
from ..data.splits import Splits
from .application import run
from .claim import Claim
from .classifier_training import Arm, Classifier, TrainingOptions
from .paired_comparison import (
    SEARCHED,
    Comparison,
    compare,
    differences_figure,
    losses_table,
    rows_of,
)
from .reproduction import Figure, Measurement, Reproduction, Table
from .subject import moved

ARMS = {"kaiming": Arm("kaiming"), "orthonormal": Arm("orthonormal"), "osrm": Arm("osrm")}
COMPARISONS = (
    Comparison(
        "Adapters that start from OSRM’s directions have a lower loss after they are merged than "
        "LoRA’s",
        "osrm",
        "kaiming",
        "higher accuracy of merged models on GLUE, RoBERTa-large (no figure taken)",
        True,
    ),
    Comparison(
        "OSRM’s directions have a lower loss after the merge than random orthonormal ones",
        "osrm",
        "orthonormal",
        "– (a third party sees no gain at width 2560: perplexity 8.38 and 8.31)",
    ),
)
THRESHOLD = 50
TASK_SEEDS = 10_000
"""The distance of the tasks' seeds: one seed would draw the same random A for both."""


def sums(options: TrainingOptions) -> Splits:
    """Sums of three numbers; the label is 1 above the threshold."""
    wanted = options.batch_size * max(
        options.head_steps, options.calibration_batches, options.steps
    )
    config = chain_sum.ChainSum(
        train_limit=wanted,
        validation_limit=options.validation,
        test_limit=1,
        min_terms=3,
        max_terms=3,
    )
    found = chain_sum.load(config)
    parts = (
        [Labelled(one.id, one.prompt, int(int(one.answer) > THRESHOLD)) for one in part]
        for part in (found.train, found.validation, found.test)
    )
    return Splits(*parts)


def measure(options: TrainingOptions) -> Measurement:
    """Train both tasks from every start, and measure them alone and merged."""
    tasks = [Classifier(options), Classifier(options, sums(options))]
    # OSRM reads the inputs of the other task.
    calibrations = [
        task.calibrated(list(ARMS.values()), other.learn)
        for task, other in zip(tasks, reversed(tasks), strict=True)
    ]
    rows = []
    for name in tracked(list(ARMS), "trainings"):
        rows += rows_of(
            options,
            name,
            lambda rate, seed, arm=ARMS[name]: merged_losses(tasks, calibrations, arm, rate, seed),
        )
    subject = tasks[0].subject
    facts = {
        "model": f"{subject.described}; a head for each task is trained alone, then frozen",
        "tasks": f"film reviews, and whether a sum of three numbers is above {THRESHOLD}; OSRM "
        "reads the batches of the other task",
        "adapter": "query and value, s = 1; both updates are added",
        "rates": f"by the merged loss: {SEARCHED}",
        "the paper’s": "RoBERTa-large, r = 8, GLUE",
    }
    return Measurement(options, {"trainings": pd.DataFrame(rows)}, facts)


def merged_losses(
    tasks: list[Classifier],
    calibrations: list[Calibration | None],
    arm: Arm,
    rate: float,
    seed: int,
) -> dict[str, float] | None:
    """Mean losses of both tasks: of each adapter alone, and of the merged model.

    Returns:
        "loss" and "accuracy" of the merged model, "alone" and "disturbance", the difference of both
        losses; None if a training diverged.
    """
    updates: list[Mapping[str, Float[Tensor, "out in"]]] = []
    alone: list[float] = []
    for number, (task, calibration) in enumerate(zip(tasks, calibrations, strict=True)):
        with task.trained(arm, rate, seed + number * TASK_SEEDS, calibration) as model:
            if model is None:
                return None
            with torch.no_grad():
                updates.append({name: layer.delta_weight() for name, layer in model.layers.items()})
            alone.append(task.scores(model)["loss"])
    both = {name: updates[0][name] + updates[1][name] for name in updates[0]}
    scores = []
    for task in tasks:
        model = task.subject.model
        weights = {name: model.get_submodule(name).weight.data for name in both}
        with moved(weights, both):
            scores.append(task.scores(model))
    found = pd.DataFrame(scores).mean().to_dict() | {"alone": sum(alone) / len(alone)}
    return found | {"disturbance": found["loss"] - found["alone"]}


def judge_all(measured: Measurement) -> list[Claim]:
    """One claim for each comparison."""
    return [compare(one, measured) for one in COMPARISONS]


def tabulate(measured: Measurement) -> list[Table]:
    """Losses alone and merged, of all arms at their best rates."""
    note = (
        "Means over seeds and tasks. alone: of each adapter without the other; disturbance: the "
        "loss minus that."
    )
    return [
        losses_table(measured, "Held-out loss after the merge", "alone", "disturbance", note=note)
    ]


def draw(measured: Measurement) -> list[Figure]:
    """The differences that decide the claims."""
    return [differences_figure(measured, COMPARISONS)]


REPRODUCTION = Reproduction(
    name="osrm_merge",
    title="OSRM: two merged adapters",
    source="Zhang & Zhou 2025, arXiv 2505.22934",
    question="Do adapters disturb each other less if each avoids the other task’s inputs?",
    options=TrainingOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
    caveats=(
        "A lower merged loss can come from less disturbance or from better training. The table has "
        "both. These two tasks share few inputs; GLUE’s tasks share more.",
    ),
)

if __name__ == "__main__":
    run(REPRODUCTION)
