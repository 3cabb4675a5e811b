"""The factor cache: a decomposition of the same weight is computed only once.

The key covers everything that the factors depend on: the method and its options, the bytes of the
weight and of the statistics, module type, rank, scaling, device type and torch version. A cache hit
is bitwise equal to a computation on that device with the same number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lora_init.cache import Cache, Entry, fingerprint, key
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.linalg.matrix import is_finite
from lora_init.linalg.moments import InputSets
from lora_init.plan.plan import Plan, Target
from lora_init.registry import Initializer

VERSIONS = {"pissa": 4, "milora": 5, "mica": 4, "corda": 5}
"""The version of the results of each cached method; increase it whenever the results change.

Only methods whose decomposition takes longer than hashing its input are cached.
"""


def cacheable(cache: Cache | None, spec: Initializer, targets: Sequence[Target]) -> bool:
    """Whether the method is cached and the factors of all targets fit into the cache."""
    if cache is None or spec.name not in VERSIONS:
        return False
    return all(cache.has_room(4 * target.parameters) for target in targets)


@dataclass(frozen=True)
class CachedFactors:
    """The cached factors of one plan on one device."""

    cache: Cache
    plan: Plan
    device: torch.device

    def key(self, layer: Layer) -> str:
        """The cache key of a layer's factors."""
        return key(
            self.plan.initializer.name,
            VERSIONS[self.plan.initializer.name],
            arithmetic(self.device),
            self.plan.options,
            layer.kind,
            layer.shape,
            layer.rank,
            layer.scaling,
            fingerprint(layer.stored_weight),
            None if layer.inputs is None else _content(layer.inputs),
        )

    def get(self, key: str, layer: Layer) -> Factors | None:
        """Load a layer's factors; None if they are not in the cache."""
        entry = self.cache.get(key)
        if entry is None or not _fits(entry, layer):
            return None
        metrics = entry.metadata | {"from_cache": True}
        return Factors(entry.tensors["lora_A"], entry.tensors["lora_B"], metrics=metrics)

    def put(self, key: str, layer: Layer, factors: Factors) -> None:
        """Store a layer's factors if they are finite and do not depend on the seed."""
        finite = is_finite(factors.lora_A) and is_finite(factors.lora_B)
        if layer.is_random or not finite or factors.core is not None:
            return
        tensors = {"lora_A": factors.lora_A, "lora_B": factors.lora_B}
        metrics = {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in factors.metrics.items()
        }
        # Does not wait for the disk: a lost entry only costs one more computation.
        self.cache.put(key, tensors, metrics, durable=False)


def arithmetic(device: torch.device) -> list[str]:
    """The device and the torch version, which affect the last bits of a result."""
    name = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    return [device.type, *name, torch.__version__]


def _content(inputs: Any) -> dict[str, Any]:
    """The statistics by name, without cached decompositions."""
    if isinstance(inputs, InputSets):
        return {name: _content(found) for name, found in inputs.sets.items()}
    shown = (field.name for field in fields(inputs) if not field.name.startswith("_"))
    return {name: getattr(inputs, name) for name in shown}


def _fits(entry: Entry, layer: Layer) -> bool:
    """Whether an entry holds float32 factors of this layer's shape."""
    rows, columns = layer.shape
    shapes = {"lora_A": (layer.rank, columns), "lora_B": (rows, layer.rank)}
    found = {name: tuple(tensor.shape) for name, tensor in entry.tensors.items()}
    return found == shapes and all(t.dtype == torch.float32 for t in entry.tensors.values())
