"""Shard the parameters of an adapted layer as its base weight is sharded."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from lora_init.layers import LoraLayer
from lora_init.weights.sharded import fsdp_mesh, sharding


def shard_adapter(model: nn.Module, name: str, layer: LoraLayer) -> None:
    """Shard the parameters of a layer that is not in the model yet.

    | the base weight is sharded by | the factors |
    |---|---|
    | FSDP2 | an FSDP2 unit of the layer, on the unit's mesh, without mixed precision |
    | tensor parallelism, by outputs | A on each rank, B by rows |
    | tensor parallelism, by inputs | A by columns, B on each rank |
    | DeepSpeed ZeRO-3 | whole, until `deepspeed.initialize` splits them |

    Args:
        model: the base model, in which `name` is still the base module.
        name: the name of the target.
        layer: the adapted layer, whose tensors are equal on all ranks.
    """
    how = sharding(model, name)
    if how == "FSDP2":
        _in_own_unit(model, name, layer)
    elif how == "tensor parallelism":
        _along_weight(layer)


def _in_own_unit(model: nn.Module, name: str, layer: LoraLayer) -> None:
    """FSDP2 has built its units already, so the layer becomes one, which reduces its gradients."""
    weight: Any = layer.stored_weight
    # Imported by the code that sharded the weight; importing it here would take seconds.
    fsdp = sys.modules["torch.distributed.fsdp"]
    mesh = fsdp_mesh(model, name)
    offloads = weight.device.type != mesh.device_type
    fsdp.fully_shard(
        layer,
        mesh=mesh,
        # Not the default: after a forward pass of the base, FSDP2 takes a new unit for a root. It
        # would keep the whole factors, and an optimizer made then would train those copies.
        reshard_after_forward=True,
        offload_policy=fsdp.CPUOffloadPolicy() if offloads else fsdp.OffloadPolicy(),
        ignored_params=set(layer.base_layer.parameters()),
    )


def _along_weight(layer: LoraLayer) -> None:
    weight: Any = layer.stored_weight
    tensor = sys.modules["torch.distributed.tensor"]
    (place,) = weight.placements
    everywhere = tensor.Replicate()
    places = {
        "lora_A": tensor.Shard(1) if place.is_shard(1) else everywhere,
        "lora_B": tensor.Shard(0) if place.is_shard(0) else everywhere,
        "lora_core": everywhere,
    }

    def distributed(value: Tensor, part: str) -> Tensor:
        return tensor.distribute_tensor(
            value.detach(), weight.device_mesh, [places[part]], src_data_rank=None
        )

    for part in places:
        if (value := getattr(layer, part)) is not None:
            made = nn.Parameter(distributed(value, part), requires_grad=value.requires_grad)
            setattr(layer, part, made)
    for part in ("lora_A", "lora_B"):
        if (value := getattr(layer, f"initial_{part}")) is not None:
            setattr(layer, f"initial_{part}", distributed(value, part))
