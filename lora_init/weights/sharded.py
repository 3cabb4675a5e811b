"""Weights that several ranks hold in parts: DTensors, and parameters of DeepSpeed ZeRO-3.

| sharded by | between two forward passes | during the forward pass of its module |
|---|---|---|
| FSDP2 (`fully_shard`) | a DTensor | a plain tensor |
| tensor parallelism | a DTensor | a DTensor |
| DeepSpeed ZeRO-3 | an empty tensor with a `ds_id` | a plain tensor |

Each function that gathers is a collective: every rank that holds a part must call it, in one order.
`module_on` gives the whole weight to one rank only, so the others need no memory for it.

A quantized weight is sharded in one of two ways. Packed codes are plain tensors: their parts are
gathered, then dequantized. A part of a tensor subclass has its own scales: each rank dequantizes
its part, then the values are gathered.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    import torch.distributed.tensor
    from torch.distributed.tensor import DTensor

Sharding = Literal["FSDP2", "tensor parallelism", "DeepSpeed ZeRO-3"]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor. By name, because importing its class takes seconds."""
    return type(tensor.data).__name__ == "DTensor"


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has split the parameter over the ranks."""
    return hasattr(parameter, "ds_id")


def is_sharded(parameter: Tensor) -> bool:
    """Whether several ranks hold the parameter in parts at this moment."""
    return is_dtensor(parameter) or is_partitioned(parameter)


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter. Communicates nothing."""
    return cast(Any, parameter).ds_shape if is_partitioned(parameter) else parameter.shape


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself."""
    return cast("DTensor", tensor).to_local() if is_dtensor(tensor) else tensor


def whole(parameter: Tensor) -> Tensor:
    """The whole tensor without gradient: gathered from all ranks, or the tensor itself."""
    if is_dtensor(parameter):
        # FSDP2 can keep shards in CPU memory, where an accelerator's process group cannot gather.
        device = cast("DTensor", parameter).device_mesh.device_type
        parts: Any = parameter.detach().to(device)
        if parts.is_floating_point() and parts.itemsize == 1:  # gloo cannot gather float8
            return parts.view(torch.uint8).full_tensor().view(parts.dtype)
        return parts.full_tensor()
    if is_partitioned(parameter):
        with sys.modules["deepspeed"].zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def whole_input(module: nn.Module, x: Float[Tensor, "*positions part"]) -> Tensor:
    """The whole input (*positions, in) of a module under tensor parallelism; else x itself.

    A module whose weight is sharded by inputs gets only its part of their columns on each rank.
    """
    if is_dtensor(x):
        return whole(x)
    weight = module._parameters.get("weight")
    if weight is None or not is_dtensor(weight) or weight.ndim != 2:
        return x
    parts = cast("DTensor", weight)
    if x.shape[-1] == parts.shape[1] or not any(place.is_shard(1) for place in parts.placements):
        return x
    shape = torch.Size((*x.shape[:-1], parts.shape[1]))
    columns = torch.distributed.tensor.DTensor.from_local(
        x.contiguous(),
        parts.device_mesh,
        [torch.distributed.tensor.Shard(x.ndim - 1)],
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    return whole(columns)


def readers_of_a_batch(model: nn.Module) -> int:
    """How many ranks run each batch together: the size of a mesh of tensor parallelism, or 1."""
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if is_dtensor(parameter) and fsdp_unit(model, name) is None:
                return group_size(parameter)
    return 1


def split_as(value: Tensor, like: Any) -> Tensor:
    """This rank's part of whole values, equal on all ranks, as a DTensor; itself if none is."""
    if not is_dtensor(like):
        return value
    return torch.distributed.tensor.distribute_tensor(
        value.detach(), like.device_mesh, like.placements, src_data_rank=None
    )


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy whole values, which are equal on all ranks, into a parameter or into its parts."""
    if is_dtensor(parameter):
        local_part(parameter.detach()).copy_(local_part(split_as(value, parameter)))
    elif is_partitioned(parameter):
        with sys.modules["deepspeed"].zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
    else:
        parameter.copy_(value)


def read_whole(read: Callable[[nn.Module], Tensor], module: nn.Module) -> Tensor:
    """Read the matrix of a module whose parameters may be sharded.

    Args:
        read: dequantizes the matrix of a module that holds plain parameters, or of one that holds
            a rank's part of a tensor subclass.
    """
    own = {name: value for name, value in module._parameters.items() if value is not None}
    sharded: dict[str, Any] = {name: value for name, value in own.items() if is_sharded(value)}
    if not sharded:
        return read(module)
    weight = sharded.get("weight")
    if weight is None or not has_own_scales(weight):
        return read(_holding(module, {name: whole(value) for name, value in sharded.items()}))
    part = read(_holding(module, {"weight": weight.detach().to_local()}))
    values = torch.distributed.tensor.DTensor.from_local(
        part, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
    )
    return whole(values)


def module_on(module: nn.Module, rank: int) -> nn.Module | None:
    """The module with its whole parameters on one rank, and None on the others.

    The other ranks send their parts to `rank`. Their memory does not grow, except under DeepSpeed
    ZeRO-3, which gathers a parameter on all ranks for a moment.

    Args:
        rank: the same on all ranks, in the default process group.
    """
    sharded = {name: each for name, each in module._parameters.items() if _is_part(each)}
    found = {name: _whole_on(value, rank) for name, value in sharded.items()}
    return _holding(module, found) if torch.distributed.get_rank() == rank else None


def _is_part(parameter: Tensor | None) -> bool:
    return parameter is not None and is_sharded(parameter)


def _whole_on(parameter: Any, rank: int) -> Tensor | None:
    """As `whole` on one rank, and None on the others."""
    is_here = torch.distributed.get_rank() == rank
    if is_partitioned(parameter):
        with sys.modules["deepspeed"].zero.GatheredParameters([parameter]):
            return parameter.detach().clone() if is_here else None
    mesh, dtype = parameter.device_mesh, parameter.dtype
    part = parameter.detach().to_local().to(mesh.device_type).contiguous()
    if part.is_floating_point() and part.itemsize == 1:  # not every backend sends float8
        part = part.view(torch.uint8)
    shards = [dim for dim, place in enumerate(parameter.placements) if not place.is_replicate()]
    if not shards or mesh.size(shards[0]) == 1:
        return part.view(dtype) if is_here else None
    (dim,) = shards  # more are refused with the plan
    group = mesh.get_group(dim)
    members = torch.distributed.get_process_group_ranks(group)
    if rank not in members:  # it receives the values from its own replica
        return None
    if not is_here:
        if part.numel() > 0:
            torch.distributed.send(part, rank, group)
        return None
    # A DTensor is split as `torch.chunk` does, so the last ranks may have less, or nothing.
    axis = parameter.placements[dim].dim
    result = part.new_empty(parameter.shape)
    pieces = result.split(-(-parameter.shape[axis] // len(members)), axis)
    for member, piece in zip(members, pieces, strict=False):
        if member == rank:
            piece.copy_(part)
        elif piece.is_contiguous():
            torch.distributed.recv(piece, member, group)
        else:
            received = torch.empty_like(piece, memory_format=torch.contiguous_format)
            torch.distributed.recv(received, member, group)
            piece.copy_(received)
    return result.view(dtype)


def has_own_scales(tensor: Tensor) -> bool:
    """Whether this rank's part of a weight is a quantizer's tensor subclass."""
    return is_dtensor(tensor) and type(local_part(tensor).data) is not Tensor


def _holding(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> nn.Module:
    """A module that shares everything with another one, except these parameters.

    It is made without `copy`, which calls the constructor of an FSDP2 unit.
    """
    made = object.__new__(type(module))
    made.__dict__ = {**vars(module), "_parameters": {**module._parameters, **parameters}}
    return made


def group_size(parameter: Tensor) -> int:
    """The number of ranks that hold a part of a sharded parameter."""
    if is_dtensor(parameter):
        return cast("DTensor", parameter).device_mesh.size()
    return torch.distributed.get_world_size(cast(Any, parameter).ds_process_group)


def fsdp_unit(model: nn.Module, name: str) -> nn.Module | None:
    """The innermost module around `name`, or `name` itself, that `fully_shard` was called on."""
    module: Any = model
    found = model if is_unit(model) else None
    for part in name.split(".") if name else ():
        module = getattr(module, part)
        if isinstance(module, nn.Module) and is_unit(module):
            found = module
    return found


def sharding(model: nn.Module, name: str) -> Sharding | None:
    """What shards the parameters of a module; None if nothing does.

    Inside an FSDP2 unit it is FSDP2, even if the weight is a buffer that every rank holds whole:
    the ranks read different batches, so the adapter's gradients must be reduced.

    Args:
        name: the name of the module, or of the parameter that holds the weights of all experts.
    """
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part)
    own = found.parameters(recurse=False) if isinstance(found, nn.Module) else [found]
    parameters = list(own)
    if any(map(is_partitioned, parameters)):
        return "DeepSpeed ZeRO-3"
    if fsdp_unit(model, name) is not None:
        return "FSDP2"
    return "tensor parallelism" if any(map(is_dtensor, parameters)) else None


def fsdp_mesh(model: nn.Module, name: str) -> Any:
    """The mesh of the FSDP2 unit around a module; None if that unit shards no parameter."""
    unit = fsdp_unit(model, name)
    sharded: Any = () if unit is None else filter(is_dtensor, unit.parameters())
    return next((parameter.device_mesh for parameter in sharded), None)


def reshard(model: nn.Module) -> None:
    """Free the whole weights that FSDP2 keeps after a forward pass, in its root module above all.

    A change to such a weight would be lost, because only the shards stay.
    """
    for module in model.modules():
        if is_unit(module):
            cast(Any, module).reshard()


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2's `fully_shard` was called on the module."""
    return _is_unit_class(type(module))


@functools.lru_cache(maxsize=1024)
def _is_unit_class(kind: type) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in kind.__mro__)
