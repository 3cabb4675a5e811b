"""Sum tensors and share errors over the ranks of the default process group.

Without a process group there is one rank. Every rank must take part in every call. Code that can
fail runs under `all_or_none`, which raises on all ranks if one rank fails. Otherwise the other
ranks would wait forever in the next reduction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed


def rank_count() -> int:
    """The number of ranks of the default process group; 1 without a group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def rank_number() -> int:
    """The rank of this process; 0 without a process group."""
    return distributed.get_rank() if rank_count() > 1 else 0


def over_ranks(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks; the result is on the device of `tensor`."""
    if rank_count() == 1:
        return tensor
    total = tensor.to(_place(tensor), copy=True)
    distributed.all_reduce(total)
    return total.to(tensor.device)


def from_ranks(item: Any) -> list[Any]:
    """Gather one item from each rank, in the order of the ranks."""
    if rank_count() == 1:
        return [item]
    items = [None] * rank_count()
    distributed.all_gather_object(items, item)
    return items


@contextmanager
def all_or_none(work: str) -> Iterator[None]:
    """Raise on all ranks if the block raises on one rank.

    Args:
        work: a description of the block, for the message.

    Raises:
        RuntimeError: another rank failed; the message contains the error of that rank.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    messages = from_ranks(failure and f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"{work}: rank {rank} failed with {message}")


def _place(tensor: Tensor) -> torch.device:
    """A device that the process group can reduce on: if possible, the device of the tensor.

    A CUDA tensor stays on its device, which may differ from the current one.
    """
    entries = distributed.get_backend_config().split(",")
    kinds = [entry.partition(":")[0] for entry in entries]
    if tensor.device.type in kinds:
        return tensor.device
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
