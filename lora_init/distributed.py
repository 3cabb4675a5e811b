"""Sums and errors over the ranks of the default process group; without one, there is one rank.

Every rank must take part in every call. So an error of one rank may not keep it from the next
reduction: what can fail runs under `all_or_none`, which makes it an error of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed


def rank_count() -> int:
    """Of the default process group; 1 without one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def rank_number() -> int:
    """This process's rank; 0 without a process group."""
    return distributed.get_rank() if rank_count() > 1 else 0


def over_ranks(tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors, the same on all; a new tensor on the device of `tensor`."""
    if rank_count() == 1:
        return tensor
    total = tensor.to(_place(tensor), copy=True)
    distributed.all_reduce(total)
    return total.to(tensor.device)


def from_ranks(item: Any) -> list[Any]:
    """The ranks' items, in the ranks' order."""
    if rank_count() == 1:
        return [item]
    items = [None] * rank_count()
    distributed.all_gather_object(items, item)
    return items


@contextmanager
def all_or_none(work: str) -> Iterator[None]:
    """Leave the block without an error on all ranks, or with one on all.

    Args:
        work: what is done, for the message.

    Raises:
        RuntimeError: another rank failed; the message is its own.
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
    """A device whose tensors the process group reduces: the tensor's own where it is one of them.

    A CUDA tensor stays on its own device, which need not be the current one.
    """
    entries = distributed.get_backend_config().split(",")
    kinds = [entry.partition(":")[0] for entry in entries]
    if tensor.device.type in kinds:
        return tensor.device
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
