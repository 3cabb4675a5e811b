"""Factors from the cache: a decomposition is made once for all ranks and scalings that share it.

A method that promises `Nesting` gives, at rank r, the first r of what it gives at any higher rank,
and depends on its inputs alone: on no seed, no layer's name, no other target. So its key holds the
method and its options, the weight's bytes and the statistics' bytes, and neither rank nor scaling.
It holds the kind of the device and torch's version too, because both decide the last bits.

A hit equals a computation on that device with the same number of threads, to the last bit, because
both take one path. Only an accelerator's last bits may depend on which other layers were computed
in the same stack. `canonical` says what is
computed: the factors at the rank that is decomposed (`linalg.nesting_rank`) and, for a balanced
method, at s = 1. `specific` makes a target's factors of them: the first r, times 1 / sqrt(s).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import linalg
from lora_init.cache import Cache, Entry, key
from lora_init.calibration.result import LayerStatistics
from lora_init.factors import Factors
from lora_init.plan.plan import Plan, Target
from lora_init.registry import Nesting


@dataclass(frozen=True)
class Input:
    """What an initializer gets of one layer; the weight is on the meta device if it is not read.

    `content` is the hash of the weight as it is stored, where a key is made of it.
    """

    weight: Float[Tensor, "out in"]
    statistics: LayerStatistics | None
    generator: torch.Generator
    content: str | None = None


VERSION = 1
"""The format of an entry. Raise it whenever the format changes."""


def canonical(target: Target, nesting: Nesting) -> Target:
    """The target at the rank and the scaling that are computed, whether or not there is a cache."""
    rank = linalg.nesting_rank(target.rank, min(target.shape))
    return replace(target, rank=rank, scaling=1.0 if nesting.balanced else target.scaling)


def specific(factors: Factors, target: Target, nesting: Nesting) -> Factors:
    """A target's factors, from those of its `canonical`.

    The scaling is a product with a float32 number: a division by a number rounds differently on an
    accelerator, and a hit is scaled on the CPU.
    """
    lora_A, lora_B = factors.lora_A[: target.rank], factors.lora_B[:, : target.rank]
    if nesting.balanced:
        root = target.scaling**-0.5
        lora_A, lora_B = lora_A * root, lora_B * root
    metrics = {name: _total(value, target.rank) for name, value in factors.metrics.items()}
    return replace(factors, lora_A=lora_A, lora_B=lora_B, metrics=metrics)


@dataclass(frozen=True)
class CachedFactors:
    """The cache as one plan sees it on one device."""

    cache: Cache
    plan: Plan
    nesting: Nesting
    device: torch.device

    def key(self, target: Target, given: Input) -> str:
        """The key of a canonical target's factors."""
        statistics = given.statistics
        inputs = None if statistics is None else statistics.inputs
        return key(
            self.plan.initializer.name,
            self.nesting.version,
            VERSION,
            arithmetic(self.device),
            self.plan.options,
            target.module_type,
            target.shape,
            target.rank,
            given.content,
            None if inputs is None else _content(inputs),
        )

    def get(self, key: str, target: Target) -> Factors | None:
        """A canonical target's factors; None where no entry has them."""
        entry = self.cache.get(key, rank=target.rank)
        if entry is None or not _fits(entry, target):
            return None
        metrics = {
            name: torch.tensor(value) if isinstance(value, list) else value
            for name, value in entry.metadata.items()
        }
        metrics["from_cache"] = True
        return Factors(entry.tensors["lora_A"], entry.tensors["lora_B"], metrics=metrics)

    def put(self, key: str, target: Target, factors: Factors) -> None:
        """Keep a canonical target's factors."""
        tensors = {"lora_A": factors.lora_A, "lora_B": factors.lora_B}
        metrics = {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in factors.metrics.items()
        }
        # Not worth a wait for the disk at every layer: a lost entry is soon computed again.
        self.cache.put(key, tensors, metrics, rank=target.rank, durable=False)


def has_room(cache: Cache | None, target: Target, nesting: Nesting | None) -> bool:
    """Whether a target's factors can be cached, so that its weight is worth a hash."""
    if cache is None or nesting is None:
        return False
    wider = canonical(target, nesting)
    return cache.has_room(4 * wider.rank * sum(wider.shape))


def arithmetic(device: torch.device) -> list[str]:
    """What decides a result's last bits and is not an input: device and version of torch."""
    name = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    return [device.type, *name, torch.__version__]


def _content(inputs: Any) -> dict[str, Any]:
    """The statistics themselves, without what has been derived from them."""
    shown = (field.name for field in fields(inputs) if not field.name.startswith("_"))
    return {name: getattr(inputs, name) for name in shown}


def _fits(entry: Entry, target: Target) -> bool:
    """Whether an entry holds factors of this target's shape; its checksum was checked before."""
    rows, columns = target.shape
    shapes = {"lora_A": (target.rank, columns), "lora_B": (rows, target.rank)}
    found = {name: tuple(tensor.shape) for name, tensor in entry.tensors.items()}
    return found == shapes and all(t.dtype == torch.float32 for t in entry.tensors.values())


def _total(value: Any, rank: int) -> Any:
    """A figure of the first `rank` components, where it is given for each of them."""
    return value[:rank].sum() if isinstance(value, Tensor) and value.ndim == 1 else value
