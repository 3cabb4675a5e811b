"""Check which modules a method supports. Errors name the module; the model is not changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_init.plan.sharded import check_sharded
from lora_init.registry import Initializer, Options
from lora_init.weights.float import is_float8
from lora_init.weights.format import WEIGHT
from lora_init.weights.kinds import class_format, is_quantized, known_format, module_type
from lora_init.weights.offload import is_offloaded, stored_weight
from lora_init.weights.sharded import is_sharded, local_part

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Extent:
    """The byte range of a storage that a parameter occupies; `owner` is the id of its module."""

    name: str
    storage: int
    start: int
    stop: int
    owner: int = 0

    def overlaps(self, other: Extent) -> bool:
        return self.storage == other.storage and self.start < other.stop and other.start < self.stop


def extent(name: str, parameter: Tensor, owner: int = 0) -> Extent:
    """The memory that a parameter occupies. Views of one flat buffer have different extents.

    A sharded parameter shares its memory only as a whole: a rank may hold an empty part of it.
    """
    if is_sharded(parameter):
        return Extent(name, id(parameter), 0, 1, owner)
    last = sum((n - 1) * step for n, step in zip(parameter.shape, parameter.stride(), strict=True))
    start = int(parameter.storage_offset()) * parameter.itemsize
    stop = start + (last + 1) * parameter.itemsize if parameter.numel() else start
    storage = parameter.untyped_storage()
    # Meta storages all have address 0: identify them by the storage object instead.
    place = storage._cdata if parameter.is_meta else storage.data_ptr()
    return Extent(name, place, start, stop, owner)


def extents(model: nn.Module) -> dict[int, list[Extent]]:
    """All parameters by storage, including all names of shared modules and tied weights."""
    found: dict[int, list[Extent]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            try:
                one = extent(f"{path}.{name}".removeprefix("."), parameter, id(module))
            except RuntimeError:  # a tensor subclass without a storage, such as a DTensor
                continue
            found.setdefault(one.storage, []).append(one)
    return found


def check_module(model: nn.Module, name: str, spec: Initializer, matrix: str = WEIGHT) -> None:
    """Raise if the method or the library does not support this target. Reads no weight values.

    Args:
        name: the name of the module.
        matrix: the name of the matrix in the module.

    Raises:
        TypeError: the module's type, or the type of its weight, is not supported.
        ValueError: the state of the weight is not supported (offloaded, made in inference mode).
    """
    module = model.get_submodule(name)
    name = name if matrix == WEIGHT else f"{name}.{matrix}"
    stored = class_format(module)
    if stored is not None and (reason := stored.refusal(module)) is not None:
        raise TypeError(f"target {name!r} {reason}. Leave it out with exclude_modules")
    if stored is None or not spec.supports(stored) or matrix not in stored.matrices(module):
        stacked = _stacked(module)
        kind = (type(module).__name__ if stacked else module_type(module)) + stacked
        raise TypeError(
            f"target {name!r} is a {kind}, which {spec.name} does not support; "
            f"must be one of {', '.join(sorted(spec.modules))}. {_fix(stacked, matrix)}"
        )
    weight = stored_weight(module) if stored.quantized else module._parameters.get(matrix)
    if weight is None:
        raise TypeError(
            f"target {name!r}: its weight is computed (a parametrization or a weight norm), so it "
            "cannot be adapted in place; remove the parametrization first"
        )
    check_sharded(model, name, spec, stored)
    if (reason := stored.unreadable(module, matrix)) is not None:
        raise ValueError(f"target {name!r}: {reason}")
    _check_presence(name, weight)
    if stored.operation in ("routed", "selection") and is_offloaded(module):
        raise ValueError(
            f"target {name!r}: its weight is offloaded by Accelerate, and adapted experts and "
            "routers need it in memory; load the module into memory first"
        )
    if spec.base == "replace" and weight.is_meta and is_offloaded(module):
        raise ValueError(
            f"target {name!r}: its weight is offloaded by Accelerate, but {spec.name} replaces "
            "it; load the model into memory first"
        )
    if stored.quantized:
        return
    if weight.is_inference() and spec.base != "keep":
        raise ValueError(
            f"target {name!r}: its weight was made under torch.inference_mode, but {spec.name} "
            "must modify it; load the model outside inference_mode"
        )
    if type(local_part(weight).data).__name__ not in ("Tensor", "Parameter"):
        raise TypeError(
            f"target {name!r}: its weight is a {type(local_part(weight).data).__name__}, which is "
            "not supported: must be a plain tensor. Load the model without this tensor subclass."
        )
    if weight.dtype not in FLOAT_DTYPES and not is_float8(weight):
        raise TypeError(
            f"target {name!r}: its weight has dtype {weight.dtype}, which is not supported: must "
            f"be one of {', '.join(map(str, FLOAT_DTYPES))}"
        )


def check_access(
    name: str,
    module: nn.Module,
    spec: Initializer,
    options: Options,
    *,
    use_dora: bool = False,
    requantizes: bool = False,
) -> None:
    """Raise if a packed weight would have to be read or written, and its format does not allow it.

    Args:
        requantizes: whether a subtracting method packs the residual.

    Raises:
        TypeError: names the format, who needs the values, and what to do instead.
    """
    stored = known_format(module)
    kind = f"target {name!r} is a {type(module).__name__} ({stored.describe(module)})"
    replaces = spec.base == "replace" or (requantizes and stored.quantized)
    sharded = requantizes and is_sharded(stored_weight(module)) and "it is sharded"
    if replaces and (reason := sharded or stored.unwritable(module)) is not None:
        cause = "quantized_base='requantize'" if requantizes else spec.name
        fix = "the unquantized model, or bitsandbytes' quantization with original_weights"
        fix = "quantized_base='in_forward'" if requantizes else fix
        raise TypeError(
            f"{kind}, whose weight cannot be written, because {reason}, but {cause} replaces it. "
            f"Use {fix}, or leave it out with exclude_modules"
        )
    if (reason := stored.opaque(module)) is None:
        return
    reads = {"weight", "target_weight"} & (spec.reads | options.also_reads())
    if cause := spec.name if reads else "use_dora=True" if use_dora else None:
        raise TypeError(
            f"{kind}, whose weight cannot be read, because {reason}, but {cause} reads it. Use a "
            "method that draws random factors or reads inputs, or leave it out with "
            "exclude_modules"
        )


def unobserved(model: nn.Module, name: str, spec: Initializer) -> str | None:
    """Why the inputs of a target cannot be observed; None if they can or are not needed."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if not spec.needs_data or type(parent) is not nn.MultiheadAttention:
        return None
    return (
        f"nn.MultiheadAttention reads its weight instead of calling it, and {spec.name} needs its "
        "inputs"
    )


def computes_product(name: str, module: nn.Module) -> bool:
    """Whether the target computes exactly the product with its stored weight, plus its bias.

    A quantizer may have replaced the instance's forward by one that rounds inputs or weights. The
    base weight is then not edited. Nor is it if a hook may change the input or the output, because
    the adapter's input and output do not pass through the hooks of the target.

    Raises:
        TypeError: the replaced forward computes a different function.
    """
    found = known_format(module).replaced_forward(module)
    if found is None or found.reason is None:
        return not (module._forward_hooks or module._forward_pre_hooks)
    if not found.is_close:
        raise TypeError(
            f"target {name!r}: a forward was set on this {type(module).__name__}, and "
            f"{found.reason}. Leave it out with exclude_modules, or restore the forward of its "
            "class"
        )
    return False


def check_groups(
    name: str,
    rank: int,
    shape: tuple[int, int],
    groups: int,
    spec: Initializer,
    options: Options,
    *,
    any_rank: bool = False,
) -> None:
    """Raise if a method does not support a grouped convolution, or this rank on it.

    Each group is a matrix (out / groups, in) that gets a start of rank / groups.

    Args:
        shape: (out, in) of the stacked matrices of all groups.
        any_rank: accept each rank that the groups can share.

    Raises:
        TypeError: the method does not support groups.
        ValueError: the groups cannot share this rank, or the rank is too high for their matrices.
    """
    obstacles = {
        "trains a core, which mixes the groups": spec.has_core,
        "replaces the base weight": spec.base == "replace",
    }
    for obstacle, applies in obstacles.items():
        if applies:
            raise TypeError(
                f"target {name!r} is a convolution with groups={groups}, which {spec.name} does "
                f"not support, because it {obstacle}. Leave it out with exclude_modules"
            )
    if rank % groups:
        raise ValueError(
            f"target {name!r}: rank {rank} is not supported: must be a multiple of "
            f"groups={groups}, because each group has its own rank. Change r, or set rank_pattern "
            "for it"
        )
    if not any_rank:
        each = f"{name}, one of {groups} groups"
        check_target_rank(each, rank // groups, (shape[0] // groups, shape[1]), spec, options)


def _stacked(module: nn.Module) -> str:
    """Describe the stacked weights of a mixture-of-experts module, for error messages."""
    # A three-dimensional `weight` belongs to a Conv1d or a Bilinear.
    parameters = (item for item in module._parameters.items() if item[0] != "weight")
    stacked = [name for name, value in parameters if getattr(value, "ndim", 0) == 3]
    return f" (parameters with all experts' weights: {', '.join(stacked)})" if stacked else ""


def _fix(stacked: str, matrix: str) -> str:
    parameters = "Name its parameters in target_parameters, or leave it out with exclude_modules"
    return parameters if stacked and matrix == WEIGHT else "Leave it out with exclude_modules"


def check_values(setting: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise if parts of the base model that are to be trained have no values.

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
    """Raise if a module to save cannot be wrapped; warn if its trained copy becomes untied.

    Raises:
        ValueError: the module is a container, which is never called.
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
            if parameter is None or is_quantized(part):
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
    """Warn if base parameters are trained in float16."""
    names = [name for name, tensor in tensors if tensor.dtype == torch.float16]
    if names:
        warnings.warn(
            f"{setting} trains {len(names)} float16 parameters in place, the first is "
            f"{names[0]!r}. torch.amp.GradScaler refuses float16 gradients: load the base in "
            "bfloat16 or float32, or train without a scaler",
            stacklevel=4,
        )


def _check_presence(name: str, weight: Tensor) -> None:
    """Raise if a weight has no local values: partitioned, or flattened.

    Float weights on the meta device are supported: see `lora_init.weights.source`.
    """
    if type(weight).__name__ == "FlatParameter" or getattr(weight, "_is_flat_param", False):
        raise ValueError(
            f"target {name!r}: its weight is flattened by FSDP; inject the adapter before wrapping "
            "the model"
        )


def sharers(
    name: str, module: nn.Module, owners: Mapping[int, list[Extent]], matrix: str = WEIGHT
) -> tuple[str, ...]:
    """Names of other modules' parameters that share memory with this matrix of a module.

    A module registered under several names is one module: none of its names is returned.
    """
    try:
        own = extent(f"{name}.{matrix}", stored_weight(module, matrix))
    except RuntimeError:  # a tensor subclass of a quantizer has no storage
        return ()
    return tuple(
        other.name
        for other in owners.get(own.storage, ())
        if other.owner != id(module) and own.overlaps(other)
    )


def rank_excess(rank: int, shape: tuple[int, int], spec: Initializer) -> bool:
    """Whether a rank exceeds the limit of a method on a weight of this shape.

    Methods that read weights, inputs or gradients have at most min(out, in) directions. Methods
    that only sample random values have no limit.
    """
    return bool(spec.reads) and rank > min(shape)


def check_target_rank(
    name: str, rank: int, shape: tuple[int, int], spec: Initializer, options: Options
) -> None:
    """Raise ValueError if a method does not support this rank on a weight of this shape."""
    if rank_excess(rank, shape, spec):
        raise ValueError(
            f"target {name!r}: rank {rank} exceeds min(out, in) = {min(shape)} of its "
            f"{shape[0]}×{shape[1]} weight; lower r, or set rank_pattern for it"
        )
    if reason := options.refuse_rank(rank, shape):
        raise ValueError(f"target {name!r}: {spec.name} cannot have rank {rank}: {reason}")
