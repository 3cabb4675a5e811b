"""What becomes of the base weight of one matrix, once its adapter starts at given factors."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.factors import Factors, low_rank_product
from lora_init.linalg.matrix import widened


def apply_factors(
    weight: Float[Tensor, "*stack out in"], factors: Factors, scaling: float = 1.0
) -> Float[Tensor, "*stack out in"]:
    """Compute the base weight that belongs to the factors of `init_factors`.

    A layer with this weight W' computes W' x + s B A x::

        factors = init_factors(weight, "pissa", r=16, lora_alpha=32)
        base = apply_factors(weight, factors, scaling=2.0)
        adapted = base + 2.0 * factors.lora_B @ factors.lora_A  # equals weight

    W' depends on what the method does to the base, which `factors.base` states:

    - "keep": W itself, the same tensor.
    - "subtract": W - s B A, so that the layer computes W x at the start.
    - "replace": the quantized weight Q, dequantized.

    Args:
        weight: W (out, in), or a stack (stack, out, in): the argument of `init_factors`. It is not
            changed.
        factors: what `init_factors` returned for it.
        scaling: s, lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.

    Returns:
        W' with the shape and the device of W. A changed weight is float32, or float64 if W is. In
        16 bits, it is not exact, and neither is the output at the start.

    Raises:
        ValueError: the factors are not from `init_factors`, or do not fit the weight.
    """
    if isinstance(scaling, bool) or not 0 < scaling < float("inf"):
        raise ValueError(f"scaling={scaling!r} is not supported: must be a finite number > 0")
    _check_fit(weight, factors)
    if factors.base == "keep":
        return weight
    matrices = [weight] if weight.ndim == 2 else list(weight)
    changed = [
        _changed(matrix.detach(), member, scaling)
        for matrix, member in zip(matrices, _members(factors, weight.ndim), strict=True)
    ]
    return changed[0] if weight.ndim == 2 else torch.stack(changed)


def _changed(weight: Tensor, member: tuple[Any, ...], scaling: float) -> Tensor:
    lora_A, lora_B, replacement = member
    if replacement is not None:
        return replacement.base(widened(weight).float(), scaling)
    return widened(weight) - low_rank_product(lora_A, lora_B, scaling)


def _members(factors: Factors, dimensions: int) -> list[tuple[Any, ...]]:
    """(A, B with the core, recipe of the base) of each matrix."""
    parts = (factors.lora_A, factors.output_factor, factors.replacement)
    if dimensions == 2:
        return [parts]
    recipes = [None] * len(parts[0]) if parts[2] is None else parts[2].members()
    return list(zip(parts[0], parts[1], recipes, strict=True))


def _check_fit(weight: Tensor, factors: Factors) -> None:
    if factors.base is None:
        raise ValueError(
            "factors.base=None is not supported: must be set. Pass what init_factors returned, or "
            "dataclasses.replace(factors, base='subtract')"
        )
    lora_A, lora_B = factors.lora_A, factors.lora_B
    wanted = (*lora_B.shape[:-1], lora_A.shape[-1])
    if weight.shape != wanted:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} is not supported with factors of a weight "
            f"{wanted}: must be the weight that init_factors got"
        )
