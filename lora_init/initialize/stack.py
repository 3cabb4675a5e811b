"""Stacks of matrices of one shape, such as the experts of a layer, one matrix at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_init.factors import Factors


def member_name(name: str | None, index: int) -> str:
    """The name of a matrix of a stack, from which its random stream derives: `name.index`."""
    return f"{name}.{index}" if name else str(index)


def member_data(setting: str, value: Any, count: int) -> list[Any]:
    """What each matrix of a stack gets of an argument.

    Args:
        setting: the argument's name.
        value: a tensor whose first dimension is the stack, a list with an entry for each matrix, a
            mapping of such values by set, or None for none.
        count: the number of matrices.

    Raises:
        ValueError: the value has another number of entries, or another type.
    """
    if value is None:
        return [None] * count
    if isinstance(value, Mapping):
        sets = {name: member_data(f"{setting}[{name!r}]", of, count) for name, of in value.items()}
        return [{name: of[index] for name, of in sets.items()} for index in range(count)]
    listed = isinstance(value, Sequence) or (isinstance(value, Tensor) and value.ndim > 0)
    if listed and len(value) == count:
        return list(value)
    got = f"with {len(value)} entries" if listed else f"of type {type(value).__name__}"
    raise ValueError(
        f"{setting} {got} is not supported with a stack of {count} matrices: must be a tensor "
        f"whose first dimension is {count}, or a list with {count} entries"
    )


def stacked_factors(members: Sequence[Factors]) -> Factors:
    """The factors of all matrices with a leading dimension.

    A metric that is a number or a tensor gets that dimension, too. Other metrics become lists.
    """
    first = members[0]
    replacement = first.replacement
    if replacement is not None:
        recipes = [one.replacement for one in members if one.replacement is not None]
        replacement = replace(
            replacement,
            lora_A=torch.stack([one.lora_A for one in recipes]),
            lora_B=torch.stack([one.lora_B for one in recipes]),
        )
    cores = [one.core for one in members if one.core is not None]
    return replace(
        first,
        lora_A=torch.stack([one.lora_A for one in members]),
        lora_B=torch.stack([one.lora_B for one in members]),
        core=torch.stack(cores) if cores else None,
        replacement=replacement,
        metrics={name: _stacked([one.metrics[name] for one in members]) for name in first.metrics},
    )


def _stacked(values: list[Any]) -> Any:
    if all(isinstance(value, bool | int | float) for value in values):
        return torch.tensor(values)
    if all(isinstance(value, Tensor) for value in values):
        return torch.stack(values)
    return values
