"""Random draws and constants on the CPU, in float32 by default.

torch's defaults for dtype and device are the caller's: results must not depend on them.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

KEPT_BLOCKS = 8
"""More shapes of layers than these alternate in few models."""

_kept: ContextVar[Callable[[], OrderedDict | None]] = ContextVar("kept blocks")


@contextmanager
def shared_blocks() -> Iterator[None]:
    """Inside it, this thread draws equal blocks once (see `normal_block`)."""
    kept = OrderedDict()
    # Weak: should an interrupt prevent the reset, the blocks end with this context all the same.
    token = _kept.set(weakref.ref(kept))
    try:
        yield
    finally:
        _kept.reset(token)


def normal_block(rows: int, columns: int, *, generator: torch.Generator) -> Tensor:
    """Standard normal numbers that the caller must not change.

    Inside `shared_blocks`, generators in the same state get the same tensor. Each ends in the state
    that drawing leaves it in. The last `KEPT_BLOCKS` blocks are kept.
    """
    kept = _kept.get(lambda: None)()
    if kept is None:
        return normal(rows, columns, generator=generator)
    key = rows, columns, generator.get_state().numpy().tobytes()
    if key in kept:
        kept.move_to_end(key)
        block, state = kept[key]
        generator.set_state(state)
        return block
    block = normal(rows, columns, generator=generator)
    kept[key] = block, generator.get_state()
    if len(kept) > KEPT_BLOCKS:
        kept.popitem(last=False)
    return block


def normal(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu")


def uniform(*shape: int, generator: torch.Generator) -> Tensor:
    """Float32 numbers, uniform in [0, 1)."""
    return torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu")


def zeros(*shape: int) -> Tensor:
    """Float32 zeros, of which one is in memory: whoever keeps them makes a copy, on any device."""
    return torch.zeros((), dtype=torch.float32, device="cpu").expand(*shape)
