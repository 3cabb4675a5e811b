"""Which modules a method can serve: every refusal by name, before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_init.registry import Initializer, Options
from lora_init.weights.bitsandbytes import is_packed, quantizer_of
from lora_init.weights.kinds import module_type, refusal, replaced_forward
from lora_init.weights.offload import is_offloaded

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Extent:
    """The bytes of a storage that a named parameter of the module `owner` (an id) lives in."""

    name: str
    storage: int
    start: int
    stop: int
    owner: int = 0

    def overlaps(self, other: Extent) -> bool:
        return self.storage == other.storage and self.start < other.stop and other.start < self.stop


def extent(name: str, parameter: Tensor, owner: int = 0) -> Extent:
    """Where a parameter's data lies; views of one flat buffer have extents of their own."""
    last = sum((n - 1) * step for n, step in zip(parameter.shape, parameter.stride(), strict=True))
    start = parameter.storage_offset() * parameter.itemsize
    stop = start + (last + 1) * parameter.itemsize if parameter.numel() else start
    storage = parameter.untyped_storage()
    # On the meta device every storage lies at address 0; the object behind it tells them apart.
    place = storage._cdata if parameter.is_meta else storage.data_ptr()
    return Extent(name, place, start, stop, owner)


def extents(model: nn.Module) -> dict[int, list[Extent]]:
    """All parameters by storage, every name of a shared module and of a tied weight included."""
    found: dict[int, list[Extent]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            try:
                one = extent(f"{path}.{name}".removeprefix("."), parameter, id(module))
            except RuntimeError:  # no memory of its own: a DTensor, which a target may not be
                continue
            found.setdefault(one.storage, []).append(one)
    return found


def check_module(model: nn.Module, name: str, spec: Initializer) -> None:
    """Refuse a target that the method or the core cannot serve; nothing is read but attributes.

    Raises:
        TypeError: its type, or what its weight is.
        ValueError: a state the weight is in.
    """
    module = model.get_submodule(name)
    kind = module_type(module)
    if (reason := refusal(module)) is not None:
        raise TypeError(
            f"target {name!r} is a {type(module).__name__}, which is not supported: {reason}. "
            "Leave it out with exclude_modules"
        )
    if kind not in spec.modules:
        raise TypeError(
            f"target {name!r} is a {kind}{_stacked(module)}, which {spec.name} does not serve; "
            f"allowed are {', '.join(sorted(spec.modules))}. Leave it out with exclude_modules"
        )
    if kind == "Conv2d" and module.groups != 1:
        raise TypeError(
            f"target {name!r} is a Conv2d with groups={module.groups}; adapters are served for "
            "groups=1 only. Leave it out with exclude_modules"
        )
    if kind == "Embedding" and module.max_norm is not None:
        raise TypeError(
            f"target {name!r} is an Embedding with max_norm={module.max_norm}, which rescales its "
            "weight in every forward pass; leave it out with exclude_modules"
        )
    weight = module._parameters.get("weight")
    if weight is None:
        raise TypeError(
            f"target {name!r}: its weight is computed (a parametrization or a weight norm), so it "
            "cannot be adapted in place; remove the parametrization first"
        )
    _check_presence(name, module, weight)
    if spec.base == "replace" and weight.is_meta and is_offloaded(module):
        raise ValueError(
            f"target {name!r}: its weight is offloaded by Accelerate, and {spec.name} puts another "
            "in its place; load the model into memory first"
        )
    if is_packed(module):
        try:
            quantizer_of(module)
        except ValueError as error:
            raise ValueError(f"target {name!r}: {error}") from error
        return
    if weight.is_inference() and spec.base != "keep":
        raise ValueError(
            f"target {name!r}: its weight was made under torch.inference_mode and cannot be "
            f"changed, which {spec.name} does; load the model outside inference_mode"
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


def unobserved(model: nn.Module, name: str, spec: Initializer) -> str | None:
    """Why the method cannot see the target's inputs; None where it can, or does not need them."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if not spec.needs_data or not isinstance(parent, nn.MultiheadAttention):
        return None
    return (
        f"nn.MultiheadAttention reads its weight instead of calling it, and {spec.name} needs its "
        "inputs"
    )


def computes_product(name: str, module: nn.Module) -> bool:
    """Whether the target computes exactly the product with its stored weight, plus its bias.

    A quantizer may have set a forward on the instance that rounds inputs or weights: then the base
    is not edited.

    Raises:
        TypeError: the forward on the instance computes another function.
    """
    found = replaced_forward(module)
    if found is None or found.reason is None:
        return True
    if not found.is_close:
        raise TypeError(
            f"target {name!r}: a forward was set on this {type(module).__name__}, and "
            f"{found.reason}. Leave it out with exclude_modules, or restore the forward of its "
            "class"
        )
    return False


def _stacked(module: nn.Module) -> str:
    """What a mixture of experts' module holds, for messages."""
    # A three-dimensional `weight` is a Conv1d's or a Bilinear's.
    parameters = (item for item in module._parameters.items() if item[0] != "weight")
    stacked = [name for name, value in parameters if getattr(value, "ndim", 0) == 3]
    return f" (parameters with all experts' weights: {', '.join(stacked)})" if stacked else ""


def check_values(setting: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parts of the base that are to be trained, and so copied, where they have no values.

    Raises:
        ValueError: one of the named `tensors` is on the meta device.
    """
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ValueError(
                f"{setting} trains {name!r}, which is on the meta device (offloaded, or not "
                "loaded); leave it out, or load this part of the model into memory first"
            )


def check_trained(model: nn.Module, name: str, owners: Mapping[int, list[Extent]]) -> None:
    """Refuse a module to save that cannot be wrapped; warn where its copy is untied.

    Raises:
        ValueError: it is a container, which is never called.
    """
    module = model.get_submodule(name)
    if type(module).forward is nn.Module.forward:
        inside = [child for child, _ in module.named_children()]
        fix = f"name what it contains, e.g. {name}.{inside[0]}" if inside else "leave it out"
        raise ValueError(
            f"modules_to_save={name!r} is not supported: it is a {type(module).__name__}, which "
            f"has no forward and is never called. It must be a module that is called: {fix}"
        )
    inner = {id(part) for part in module.modules()}
    for path, part in module.named_modules(prefix=name):
        for key, parameter in part._parameters.items():
            if parameter is None or is_packed(part):
                continue
            own = extent(f"{path}.{key}", parameter)
            others = (other for other in owners.get(own.storage, ()) if own.overlaps(other))
            if shared := [other.name for other in others if other.owner not in inner]:
                warnings.warn(
                    f"modules_to_save: {own.name!r} shares its memory with {shared[0]!r}. The "
                    "trained copy does not: it is untied, and the other keeps the original. To "
                    "train both, adapt them as target_modules",
                    stacklevel=4,
                )


def warn_of_float16(setting: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Warn of parts of the base that are trained in float16, in place."""
    names = [name for name, tensor in tensors if tensor.dtype == torch.float16]
    if names:
        warnings.warn(
            f"{setting} trains {len(names)} float16 parameters in place, the first is "
            f"{names[0]!r}. torch.amp.GradScaler refuses float16 gradients: load the base in "
            "bfloat16 or float32, or train without a scaler",
            stacklevel=4,
        )


def _check_presence(name: str, module: nn.Module, weight: Tensor) -> None:
    """Refuse weights that are elsewhere: partitioned, flattened; packed, and without their codes.

    Float weights on the meta device are served: see `lora_init.weights.source`.
    """
    if weight.is_meta and is_packed(module):
        raise ValueError(
            f"target {name!r}: its quantised weight is on the meta device (offloaded, or not "
            "loaded); load the model into memory first, or build it without a quantization_config"
        )
    if hasattr(weight, "ds_id"):
        raise ValueError(
            f"target {name!r}: its weight is partitioned by DeepSpeed ZeRO-3; inject the adapter "
            "before deepspeed.initialize, from a model that is loaded whole"
        )
    if type(weight).__name__ == "FlatParameter" or getattr(weight, "_is_flat_param", False):
        raise ValueError(
            f"target {name!r}: its weight is flattened by FSDP; inject the adapter before wrapping "
            "the model"
        )


def sharers(name: str, module: nn.Module, owners: Mapping[int, list[Extent]]) -> tuple[str, ...]:
    """Parameters of other modules that lie in the same memory as this one's weight.

    A module that hangs in two places is one module: all its names are left out.
    """
    own = extent(f"{name}.weight", module.weight)
    return tuple(
        other.name
        for other in owners.get(own.storage, ())
        if other.owner != id(module) and own.overlaps(other)
    )


def rank_excess(rank: int, shape: tuple[int, int], spec: Initializer) -> bool:
    """Whether a rank exceeds what a method can have on a weight: one that only draws has no limit.

    Methods that read weights, inputs or gradients take directions from them, of which there are
    min(out, in).
    """
    return bool(spec.reads) and rank > min(shape)


def check_target_rank(
    name: str, rank: int, shape: tuple[int, int], spec: Initializer, options: Options
) -> None:
    """Raises ValueError if a method does not support this rank on a weight of this shape."""
    if rank_excess(rank, shape, spec):
        raise ValueError(
            f"target {name!r}: rank {rank} exceeds min(out, in) = {min(shape)} of its "
            f"{shape[0]}×{shape[1]} weight; lower r, or set rank_pattern for it"
        )
    if reason := options.refuse_rank(rank, shape):
        raise ValueError(f"target {name!r}: {spec.name} cannot have rank {rank}: {reason}")
