"""Telling one base weight from another, cheaply and by samples.

`lora_init.weights.checksum` compares all bytes.
"""

from __future__ import annotations

import base64
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

SAMPLES_A_SIDE = 12

# Two roundings to bfloat16 (2^-9 each) and the last bits of a restored weight: nothing else moves a
# sample of the same base, whether it was loaded in float32 or in 16 bits.
RELATIVE_TOLERANCE = 2.0**-7


def fingerprint(weight: Float[Tensor, "out in"]) -> str:
    """Up to 144 evenly spaced entries of the weight in bfloat16, as text.

    A sample, so that a model of any size costs milliseconds: it tells one base from another, it is
    no proof against a single changed entry.
    """
    return base64.b64encode(_samples(weight).view(torch.int16).numpy().tobytes()).decode()


def has_fingerprint(weight: Float[Tensor, "out in"], expected: str) -> bool:
    """Whether the weight's samples are those of `expected`, up to rounding."""
    codes = np.frombuffer(base64.b64decode(expected), dtype=np.int16).copy()
    theirs = torch.from_numpy(codes).view(torch.bfloat16).float()
    ours = _samples(weight).float()
    if ours.shape != theirs.shape:
        return False
    # Entries near zero owe their last bits to the largest ones, through a restored subtraction.
    slack = 1e-5 * theirs.abs().max()
    return bool(((ours - theirs).abs() <= RELATIVE_TOLERANCE * theirs.abs() + slack).all())


def _samples(weight: Float[Tensor, "out in"]) -> Tensor:
    row, column = (torch.tensor(_places(size), device=weight.device) for size in weight.shape)
    return weight[row[:, None], column].to(torch.bfloat16).cpu().contiguous().flatten()


@cache
def _places(size: int) -> tuple[int, ...]:
    """Numbers, not a tensor: that would keep the default device and mode of whoever came first."""
    places = torch.linspace(
        0, size - 1, min(SAMPLES_A_SIDE, size), dtype=torch.float32, device="cpu"
    )
    return tuple(places.long().tolist())
