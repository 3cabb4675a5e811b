"""Intruder dimensions: leading directions of the trained weight that the original had nowhere.

Of the k leading left singular vectors of W_tuned, those count whose largest |cosine| with any left
singular vector of the original W is below 0.5.

Source: Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", algorithm
1, arXiv 2410.21228.
Deviations: signs of singular vectors are arbitrary, so that |cosine| is compared; the leading
vectors of W_tuned come from a partial decomposition. All singular vectors of W are compared with,
as in the paper: leaving the small ones out would count directions that training only strengthened.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.factors import widened
from lora_init.linalg import top_singular

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
