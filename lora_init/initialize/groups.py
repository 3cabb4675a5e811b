"""The layer of each group of a grouped convolution, and the factors of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_init.factors import Factors, block_matrix
from lora_init.layer import STACKED, Layer


def group_layers(layer: Layer, groups: int) -> list[Layer]:
    """One layer (out / groups, in) of rank / groups for each group.

    Its random stream follows from the layer's name and the number of the group. The inputs are the
    members of the layer's `StackedInputs`.
    """
    rows, columns = layer.shape
    inputs: Any = layer.inputs
    parts = {name: _parts(getattr(layer, name), groups) for name in (*STACKED, "target_weight")}
    parts["inputs"] = [None] * groups if inputs is None else inputs.members
    planned = layer.planned_rank
    return [
        replace(
            layer,
            names=(f"{layer.names[0]}[{group}]",),
            shape=(rows // groups, columns),
            rank=layer.rank // groups,
            planned_rank=None if planned is None else planned // groups,
            **{name: part[group] for name, part in parts.items()},
        )
        for group in range(groups)
    ]


def joined(factors: Sequence[Factors]) -> Factors:
    """The factors of a grouped convolution; B is zero between the groups.

    The metrics of the groups are left out, because no sum of them belongs to the whole layer.
    """
    blocks = torch.cat([one.lora_B for one in factors])
    return Factors(torch.cat([one.lora_A for one in factors]), block_matrix(blocks, len(factors)))


def _parts(tensor: Tensor | None, groups: int) -> Sequence[Any]:
    return [None] * groups if tensor is None else tensor.chunk(groups)
