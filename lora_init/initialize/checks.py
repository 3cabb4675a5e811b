"""Checks of new factors and their metrics, for a whole stack of layers.

One norm per factor shows whether it is finite and whether it is zero.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_init.factors import Factors
from lora_init.linalg.matrix import is_finite
from lora_init.linalg.transfer import on_host
from lora_init.plan.plan import Target
from lora_init.registry import Initializer, Options


@dataclass(frozen=True)
class FactorNorms:
    """The norms of each layer's factors, as tensors on the factors' devices."""

    factors: Sequence[Factors]
    norms: Sequence[Tensor]

    @classmethod
    def of(cls, factors: Sequence[Factors]) -> FactorNorms:
        pairs = ((one.lora_A, one.output_factor) for one in factors)
        return cls(
            factors, [torch.linalg.vector_norm(each.detach()) for ab in pairs for each in ab]
        )

    def checked(
        self, targets: Sequence[Target], spec: Initializer, metrics: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Check the factors, and return each layer's metrics as numbers.

        All norms and metrics of a device are read in one copy. A layer whose factors are both zero
        causes a warning.

        Raises:
            ValueError: a factor has NaN or infinite values; the message names its target.
        """
        tensors = [v for layer in metrics for v in layer.values() if isinstance(v, Tensor)]
        values = iter(on_host([*self.norms, *tensors]))
        for target, factors in zip(targets, self.factors, strict=True):
            norm_A, norm_B = next(values), next(values)
            if not (math.isfinite(norm_A) and math.isfinite(norm_B)):
                # The norm of large finite numbers can overflow, so this reads the factors.
                refuse_non_finite_factors(target.name, spec, factors)
            # Squares of tiny numbers underflow, so this reads the factors.
            if norm_A == norm_B == 0 and not (factors.lora_A.any() or factors.lora_B.any()):
                _warn_of_zeros(target, spec)
        return [
            {
                name: next(values) if isinstance(value, Tensor) else value
                for name, value in layer.items()
            }
            for layer in metrics
        ]


def warn_of_concerns(
    spec: Initializer, options: Options, layers: Sequence[tuple[str, int, Mapping[str, Any]]]
) -> None:
    """Emit a warning for each concern of the method, which counts the layers.

    Args:
        layers: name, rank and metrics of each layer.
    """
    found: dict[str, list[str]] = {}
    for name, rank, metrics in layers:
        if (concern := options.concern(metrics, rank)) is not None:
            found.setdefault(concern, []).append(name)
    for concern, names in found.items():
        warnings.warn(
            f"{spec.name}: in {len(names)} of {len(layers)} layers, the first is {names[0]!r}, "
            f"{concern}",
            stacklevel=3,
        )


def check_shapes(
    name: str, shape: tuple[int, int], rank: int, spec: Initializer, factors: Factors
) -> None:
    """Raise ValueError if the factors do not fit the target or the method's registration."""
    rows, columns = shape
    for which, factor, expected in (
        ("lora_A", factors.lora_A, (rank, columns)),
        ("lora_B", factors.lora_B, (rows, rank)),
    ):
        if tuple(factor.shape) != expected:
            raise ValueError(
                f"{spec.name} returned {which} of shape {tuple(factor.shape)} for target "
                f"{name!r}: must be {expected}"
            )
    core = None if factors.core is None else tuple(factors.core.shape)
    if core != ((rank, rank) if spec.has_core else None):
        raise ValueError(
            f"{spec.name} is registered with has_core={spec.has_core} but its core for target "
            f"{name!r} has shape {core}"
        )
    if (factors.replacement is not None) != (spec.base == "replace"):
        raise ValueError(
            f"{spec.name} is registered with base={spec.base!r} but its result "
            f"{'has' if factors.replacement is not None else 'lacks'} a replacement"
        )


def moved_together(factors: Sequence[Factors], devices: Sequence[torch.device]) -> list[Factors]:
    """Move factors from the CPU to their common accelerator in one copy.

    Other factors are not moved, and neither are constants, which have one number in memory.
    """
    moves = len(set(devices)) == 1 and devices[0].type != "cpu" and len(factors) > 1
    result = list(factors)
    for name in ("lora_A", "lora_B") if moves else ():
        parts = [getattr(one, name) for one in factors]
        if all(part.device.type == "cpu" and any(part.stride()) for part in parts):
            stack = torch.stack(parts).to(devices[0])
            result = [replace(one, **{name: part}) for one, part in zip(result, stack, strict=True)]
    return result


def refuse_non_finite_factors(name: str, spec: Initializer, factors: Factors) -> None:
    """Raise ValueError if a factor has NaN or infinite values."""
    for which in ("lora_A", "lora_B", "core"):
        factor = getattr(factors, which)
        if factor is not None and not is_finite(factor):
            raise ValueError(
                f"{spec.name} returned non-finite values in {which} for target {name!r}"
            )


def _warn_of_zeros(target: Target, spec: Initializer) -> None:
    warnings.warn(
        f"target {target.name!r} starts with both factors zero under {spec.name}, because its "
        "weight or the matrix that the method decomposes is zero. It gets no gradient and will not "
        "learn; leave it out (exclude_modules) or choose another method",
        stacklevel=2,
    )
