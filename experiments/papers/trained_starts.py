"""Small claims about starts that need a training: RLPO, Init[B], LoRA-DA, LoRA-SB and PSDLoRA.

A classifier is trained for a few steps from every start, each at its own best learning rate. Each
claim compares the held-out losses of two starts, seed by seed. Controls separate the direction of a
start from its size: Kaiming's A is rescaled to the size of the A that it is compared with.

Sources: arXiv 2606.31813 (RLPO); Hayou, Ghosh & Yu 2024, arXiv 2406.08447 (Init[A] and Init[B]);
Zhang et al. 2025, arXiv 2510.24561 (LoRA-DA); Ponkshe et al. 2024, arXiv 2411.19557 (LoRA-SB);
PSDLoRA-Initialization (code).
"""

from __future__ import annotations

import math
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from lora_init.progress import tracked

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

STEP_AT_ONE = 1024 / 5.66
"""LoRA-DA's gamma for the authors' first step, which belongs to the scaling 5.66, at scaling 1."""


def orthonormal_size(lora_A: Tensor, lora_B: Tensor, generator: torch.Generator) -> None:
    """Give A the norm of r orthonormal rows."""
    lora_A.mul_(math.sqrt(len(lora_A)) / lora_A.norm())


def noise_size(lora_A: Tensor, lora_B: Tensor, generator: torch.Generator) -> None:
    """Give A the standard deviation of PSDLoRA, sqrt(2 / (in + r))."""
    lora_A.mul_(math.sqrt(2 / sum(lora_A.shape)) / lora_A.std(correction=0))


def orthonormal_columns(lora_A: Tensor, lora_B: Tensor, generator: torch.Generator) -> None:
    """Replace the columns of B with an orthonormal basis of their span."""
    lora_B.copy_(torch.linalg.qr(lora_B).Q)


def permuted_inputs(lora_A: Tensor, lora_B: Tensor, generator: torch.Generator) -> None:
    """Permute the columns of A, which belong to input features."""
    lora_A.copy_(lora_A[:, torch.randperm(lora_A.shape[1], generator=generator)])


def arms_of(rank: int, core_rank: int) -> dict[str, Arm]:
    """All starts by their name on the page."""
    lora_one = {"name": "lora_one", "gamma": 8 * rank**0.5}
    return {
        "kaiming": Arm("kaiming"),
        "kaiming, norm of orthonormal A": Arm("kaiming", change=orthonormal_size),
        "orthonormal": Arm("orthonormal"),
        "rlpo": Arm("rlpo"),
        "init_b": Arm("init_b"),
        "orthonormal B": Arm("init_b", change=orthonormal_columns),
        "kaiming, A frozen": Arm("kaiming", frozen=True),
        "eva_frozen": Arm({"name": "eva_frozen", "rho": 1.0}),
        "lora_one, A frozen": Arm(lora_one, frozen=True),
        "lora_da_frozen": Arm({"name": "lora_da_frozen", "gamma": STEP_AT_ONE}),
        "kaiming, rank 1": Arm("kaiming", rank=1),
        "lora_xs": Arm("lora_xs", rank=core_rank),
        "lora_sb": Arm("lora_sb", rank=core_rank),
        "psd": Arm("psd"),
        "psd, inputs permuted": Arm("psd", change=permuted_inputs),
        "kaiming, size of psd": Arm("kaiming", change=noise_size),
    }


COMPARISONS = (
    Comparison(
        "RLPO’s directions start better than LoRA’s in supervised training, too",
        "rlpo",
        "kaiming",
        "mean of mathematics benchmarks 65.03 (LoRA 62.40), reinforcement learning",
        True,
    ),
    Comparison(
        "Orthonormal rows start better than Kaiming’s rows of the same norm",
        "orthonormal",
        "kaiming, norm of orthonormal A",
    ),
    Comparison(
        "RLPO’s directions start better than random orthonormal ones", "rlpo", "orthonormal"
    ),
    Comparison(
        "Init[A] learns more than Init[B]",
        "kaiming",
        "init_b",
        "commonsense 74.1 and 71.1 (Llama-3.2-1B, r = 16, in Riemannion’s table)",
        True,
    ),
    Comparison(
        "With A frozen, LoRA-DA’s directions are better than random ones",
        "lora_da_frozen",
        "kaiming, A frozen",
        "GSM8K 49.4 and 41.5 (Llama-2-7B)",
        True,
    ),
    Comparison(
        "With A frozen, LoRA-DA’s directions are better than those of the inputs (EVA)",
        "lora_da_frozen",
        "eva_frozen",
    ),
    Comparison(
        "With A frozen, LoRA-DA’s directions are better than those of the gradient (LoRA-One)",
        "lora_da_frozen",
        "lora_one, A frozen",
    ),
    Comparison(
        "LoRA-SB learns more than LoRA with as many trained parameters",
        "lora_sb",
        "kaiming, rank 1",
        "better scores than LoRA with 27 to 90 times fewer parameters",
        True,
    ),
    Comparison("LoRA-SB’s start is better than LoRA-XS’s for the same core", "lora_sb", "lora_xs"),
    Comparison(
        "PSDLoRA starts better than Kaiming’s A of the same standard deviation",
        "psd",
        "kaiming, size of psd",
        "its own control of this size recovers much of the gain (no figure)",
        True,
    ),
    Comparison(
        "PSDLoRA’s order of the inputs matters: a permutation is worse",
        "psd",
        "psd, inputs permuted",
    ),
)


def measure(options: TrainingOptions) -> Measurement:
    """Train every arm."""
    classifier = Classifier(options)
    layers = [m for name, m in classifier.subject.model.named_modules() if name.endswith("query")]
    height, width = layers[0].weight.shape
    core_rank = math.isqrt(height + width)
    arms = arms_of(options.rank, core_rank)
    calibration = classifier.calibrated(list(arms.values()))
    rows = []
    for name in tracked(list(arms), "trainings"):
        rows += rows_of(options, name, partial(classifier.scored, arms[name], calibration))
    facts = {
        "model": f"{classifier.subject.described}; the head is trained alone, then frozen",
        "data": "film reviews",
        "adapter": f"query and value, s = 1; cores of rank {core_rank}: {core_rank**2} parameters, "
        f"rank 1 has {height + width}",
        "rates": SEARCHED,
    }
    return Measurement(options, {"trainings": pd.DataFrame(rows)}, facts)


def judge_all(measured: Measurement) -> list[Claim]:
    """One claim for each comparison."""
    return [compare(one, measured) for one in COMPARISONS]


def tabulate(measured: Measurement) -> list[Table]:
    """Losses and accuracies of all arms at their best rates."""
    note = "Means over seeds. Claims compare seed by seed, which is finer."
    return [losses_table(measured, "Held-out loss", note=note)]


def draw(measured: Measurement) -> list[Figure]:
    """The differences that decide the claims."""
    return [differences_figure(measured, COMPARISONS)]


REPRODUCTION = Reproduction(
    name="trained_starts",
    title="Small claims: directions, sizes and cores",
    source="RLPO, Init[B], LoRA-DA, LoRA-SB, PSDLoRA (arXiv numbers in the module)",
    question="Which claimed advantages remain in a short supervised training at tuned rates?",
    options=TrainingOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
    caveats=(
        "A few steps on one small classifier show how a training begins. None of the papers’ "
        "models and tasks is among them.",
    ),
)

if __name__ == "__main__":
    run(REPRODUCTION)
