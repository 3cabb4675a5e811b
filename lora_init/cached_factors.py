"""Factors from the cache: a decomposition is made once for all ranks and scalings that share it.

A method that promises `Nesting` gives, at rank r, the first r of what it gives at any higher rank,
and depends on its inputs alone: on no seed, no layer's name, no other target. So its key holds the
method and its options, the weight's bytes and the statistics' bytes, and neither rank nor scaling.
What a balanced method returns is kept for s = 1: both of its factors fall with sqrt(s).

A partial decomposition's last digits depend on how many triplets it was asked for, which is a power
of two (`linalg.nesting_rank`), and part of the key: ranks that share it get the same factors with
and without a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.cache import Cache, fingerprint, key
from lora_init.calibration import LayerStatistics
from lora_init.factors import Factors
from lora_init.linalg import nesting_rank
from lora_init.plan import Plan, Target
from lora_init.registry import Nesting


@dataclass(frozen=True)
class Input:
    """What an initializer gets of one layer; the weight is on the meta device if it is not read."""

    weight: Float[Tensor, "out in"]
    statistics: LayerStatistics | None
    generator: torch.Generator


@dataclass(frozen=True)
class CachedFactors:
    """The cache as one plan sees it."""

    cache: Cache
    plan: Plan
    nesting: Nesting

    def key(self, target: Target, given: Input) -> str:
        statistics = given.statistics
        inputs = None if statistics is None else statistics.inputs
        return key(
            self.plan.initializer.name,
            self.nesting.version,
            self.plan.options,
            target.module_type,
            target.shape,  # of layers that share their input and are not read, nothing else differs
            self.widened(target).rank,
            None if given.weight.is_meta else fingerprint(given.weight),
            None if inputs is None else _content(inputs),
        )

    def widened(self, target: Target) -> Target:
        """The target at the rank that is decomposed for it."""
        rank = nesting_rank(target.rank, min(target.shape))
        return replace(target, rank=rank)

    def get(self, key: str, target: Target) -> Factors | None:
        entry = self.cache.get(key, rank=target.rank)
        if entry is None:
            return None
        root = target.scaling**0.5 if self.nesting.balanced else 1.0
        lora_A, lora_B = (entry.tensors[name] / root for name in ("lora_A", "lora_B"))
        metrics = entry.metadata | {"from_cache": True}
        return truncated(Factors(lora_A, lora_B, metrics=metrics), target.rank)

    def put(self, key: str, target: Target, factors: Factors) -> None:
        root = target.scaling**0.5 if self.nesting.balanced else 1.0
        tensors = {"lora_A": factors.lora_A * root, "lora_B": factors.lora_B * root}
        metrics = {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in factors.metrics.items()
        }
        self.cache.put(key, tensors, metrics, rank=target.rank)


def _content(inputs: Any) -> dict[str, Any]:
    """The statistics themselves, without what has been derived from them."""
    shown = (field.name for field in fields(inputs) if not field.name.startswith("_"))
    return {name: getattr(inputs, name) for name in shown}


def truncated(factors: Factors, rank: int) -> Factors:
    """The first `rank` of factors that nest."""
    return replace(factors, lora_A=factors.lora_A[:rank], lora_B=factors.lora_B[:, :rank])
