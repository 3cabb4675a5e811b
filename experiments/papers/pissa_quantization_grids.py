"""Weights put on a 4-bit grid, and taken off the one that they are on.

SmolLM2's weights here are the values of a Q4_1 file: in each run of 32 along a row, 16 levels
between the run's least and largest value. An NF4 error of such a weight is a function of few
levels, and not the error of an ordinary weight. Three variants of a weight tell what that does:

    rounded    an ordinary weight on such a grid
    noisy      the same weight with white noise of the size of that rounding, off the grid
    dithered   a weight on a grid, spread evenly over a step of it
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

RUN = 32
LEVELS = 16

Weight = Float[Tensor, "out in"]


def rounded(weight: Weight) -> Weight:
    """The nearest values of llama.cpp's Q4_1, whose step and least value are 16-bit floats.

    Raises:
        ValueError: the weight is not a whole number of runs.
    """
    runs = _runs(weight)
    least, step = _grid(runs)
    inverse = torch.where(step > 0, 1 / step, torch.zeros_like(step))
    codes = ((runs - least) * inverse).round().clamp(0, LEVELS - 1)
    values = codes * step.half().float() + least.half().float()
    return values.reshape(weight.shape)


def noisy(weight: Weight, generator: torch.Generator) -> Weight:
    """W + N, N Gaussian with the Frobenius norm of the rounding's error."""
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    size = (rounded(weight) - weight).norm() / noise.norm()
    return weight + size * noise


def dithered(weight: Weight, generator: torch.Generator) -> Weight:
    """W + U, U uniform over one step of the grid that each run of W is on."""
    runs = _runs(weight)
    step = _grid(runs)[1]
    spread = torch.rand(runs.shape, generator=generator).to(weight) - 0.5
    return (runs + step * spread).reshape(weight.shape)


def on_grid(weight: Weight) -> bool:
    """Whether rounding leaves it (nearly) alone: an ordinary weight moves by 7 % or more."""
    if weight.numel() % RUN:
        return False
    return float((rounded(weight) - weight).norm()) < 0.01 * float(weight.norm())


def _runs(weight: Weight) -> Float[Tensor, "runs 32"]:
    if weight.shape[1] % RUN:
        raise ValueError(
            f"a weight with {weight.shape[1]} columns is not supported: must be a multiple of 32"
        )
    return weight.float().reshape(-1, RUN)


def _grid(runs: Tensor) -> tuple[Tensor, Tensor]:
    """Each run's least value and its step."""
    least, largest = runs.amin(1, keepdim=True), runs.amax(1, keepdim=True)
    return least, (largest - least) / (LEVELS - 1)
