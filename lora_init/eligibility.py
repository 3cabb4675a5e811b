"""Which modules a method can serve: every refusal by name, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_init.modules import module_type
from lora_init.registry import Initializer

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Extent:
    """The bytes of a storage that a named parameter lives in."""

    name: str
    storage: int
    start: int
    stop: int

    def overlaps(self, other: Extent) -> bool:
        return self.storage == other.storage and self.start < other.stop and other.start < self.stop


def extent(name: str, parameter: Tensor) -> Extent:
    """Where a parameter's data lies; views of one flat buffer have extents of their own."""
    last = sum((n - 1) * step for n, step in zip(parameter.shape, parameter.stride(), strict=True))
    start = parameter.storage_offset() * parameter.itemsize
    stop = start + (last + 1) * parameter.itemsize if parameter.numel() else start
    return Extent(name, parameter.untyped_storage().data_ptr(), start, stop)


def extents(model: nn.Module) -> dict[int, list[Extent]]:
    """All parameters by storage, every name of a shared module and of a tied weight included."""
    found: dict[int, list[Extent]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta:
            one = extent(name, parameter)
            found.setdefault(one.storage, []).append(one)
    return found


def check_module(model: nn.Module, name: str, spec: Initializer) -> None:
    module = model.get_submodule(name)
    kind = module_type(module)
    if kind not in spec.module_types:
        raise TypeError(
            f"target {name!r} is a {kind}, which {spec.name} does not serve; allowed are "
            f"{', '.join(sorted(spec.module_types))}. Leave it out with exclude_modules"
        )
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        raise TypeError(
            f"target {name!r} belongs to an nn.TransformerEncoderLayer, whose fused kernel reads "
            "its weight in eval mode and would never call an adapter; leave it out "
            "(exclude_modules)"
        )
    weight = module._parameters.get("weight")
    if weight is None:
        raise TypeError(
            f"target {name!r}: its weight is computed (a parametrization or a weight norm), so it "
            "cannot be adapted in place; remove the parametrization first"
        )
    if weight.is_inference() and spec.base != "keep":
        raise ValueError(
            f"target {name!r}: its weight was made under torch.inference_mode and cannot be "
            f"changed, which {spec.name} does; load the model outside inference_mode"
        )
    if weight.is_meta:
        raise ValueError(
            f"target {name!r}: its weight is on the meta device (offloaded or not loaded); load "
            "the model into memory first"
        )
    if type(weight.data).__name__ not in ("Tensor", "Parameter"):
        raise TypeError(
            f"target {name!r}: its weight is a {type(weight.data).__name__} (sharded or a tensor "
            "subclass), which is not served; initialize before sharding"
        )
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"target {name!r}: its weight has dtype {weight.dtype}; allowed are "
            f"{', '.join(map(str, FLOAT_DTYPES))}"
        )


def check_sharing(
    name: str, module: nn.Module, spec: Initializer, owners: Mapping[int, list[Extent]]
) -> None:
    if spec.base == "keep":
        return
    own = extent(f"{name}.weight", module.weight)
    others = [
        other.name
        for other in owners[own.storage]
        if other.name != own.name and own.overlaps(other)
    ]
    if others:
        raise ValueError(
            f"target {name!r} shares its weight with {', '.join(map(repr, others))}, and "
            f"{spec.name} changes the base: those would change too. Untie the weights, leave the "
            "target out (exclude_modules), or choose a method that keeps the base"
        )


def check_target_rank(name: str, rank: int, shape: tuple[int, int], spec: Initializer) -> None:
    if rank > min(shape):
        raise ValueError(
            f"target {name!r}: rank {rank} exceeds min(out, in) = {min(shape)} of its "
            f"{shape[0]}×{shape[1]} weight; lower r, or set rank_pattern for it"
        )
    reason = spec.rank_rule(rank, *shape) if spec.rank_rule else None
    if reason:
        raise ValueError(f"target {name!r}: {spec.name} cannot have rank {rank}: {reason}")
