"""Fingerprints that distinguish base weights cheaply, from samples.

`lora_init.injection.checksum` compares all bytes.
"""

from __future__ import annotations

import base64
import math
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

SAMPLES_A_SIDE = 12

# Covers two roundings to bfloat16 (2^-9 each) and the last bits of a restored weight. Samples of
# the same base, loaded in float32 or in 16 bits, differ by no more.
RELATIVE_TOLERANCE = 2.0**-7


def fingerprint(weight: Float[Tensor, "*experts out in"]) -> str:
    """Encode up to 144 evenly spaced entries of the weight in bfloat16 as text.

    Sampling is fast for models of any size. It distinguishes base weights, but can miss a single
    changed entry. The rows of experts are numbered through all experts.
    """
    return base64.b64encode(_samples(weight).view(torch.int16).numpy().tobytes()).decode()


def has_fingerprint(weight: Float[Tensor, "*experts out in"], expected: str) -> bool:
    """Whether the weight's samples equal those of `expected`, up to rounding."""
    codes = np.frombuffer(base64.b64decode(expected), dtype=np.int16).copy()
    theirs = torch.from_numpy(codes).view(torch.bfloat16).float()
    ours = _samples(weight).float()
    if ours.shape != theirs.shape:
        return False
    # Restoring an edited weight leaves rounding errors relative to its largest entries.
    slack = 1e-5 * theirs.abs().max()
    return bool(((ours - theirs).abs() <= RELATIVE_TOLERANCE * theirs.abs() + slack).all())


def _samples(weight: Float[Tensor, "*experts out in"]) -> Tensor:
    *experts, rows, columns = weight.shape
    sizes = math.prod(experts) * rows, columns
    row, column = (torch.tensor(_places(size), device=weight.device) for size in sizes)
    row = row[:, None]
    entries = weight[row // rows, row % rows, column] if experts else weight[row, column]
    return entries.to(torch.bfloat16).cpu().contiguous().flatten()


@cache
def _places(size: int) -> tuple[int, ...]:
    """Sample positions as ints: a cached tensor would keep the first caller's device and mode."""
    places = torch.linspace(
        0, size - 1, min(SAMPLES_A_SIDE, size), dtype=torch.float32, device="cpu"
    )
    return tuple(places.long().tolist())
