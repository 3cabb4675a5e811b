"""Intruder dimensions: leading directions of the trained weight that the original lacks.

A leading left singular vector of W_tuned is an intruder if its |cosine| with every left singular
vector of the original W is below 0.5.

Source: Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", algorithm
1, arXiv 2410.21228.
Deviations: signs of singular vectors are arbitrary, so |cosine| is compared. The leading vectors of
W_tuned come from a partial decomposition. As in the paper, all singular vectors of W are used:
without the small ones, directions that training only strengthened would count.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import top_singular
from lora_init.linalg.matrix import widened

THRESHOLD = 0.5


@torch.no_grad()
def intruder_dimensions(
    original: Float[Tensor, "out in"], tuned: Float[Tensor, "out in"], directions: int
) -> int:
    """How many of the `directions` leading left singular vectors of `tuned` are intruders."""
    before = torch.linalg.svd(widened(original), full_matrices=False).U
    after = top_singular(widened(tuned), min(directions, *tuned.shape)).left
    nearest = (before.T @ after).abs().amax(0)
    return int((nearest < THRESHOLD).sum())
