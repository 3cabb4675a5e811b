"""Random draws and constants on the CPU, in float32 by default.

torch's default dtype and device are the caller's choice. Results must not depend on them.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator, or one for each matrix of a stack."""

KEPT_BLOCKS = 8
"""Few models alternate between more layer shapes than this."""

_kept: ContextVar[Callable[[], OrderedDict | None]] = ContextVar("kept blocks")


@contextmanager
def shared_blocks() -> Iterator[None]:
    """Inside this context, `normal_block` draws equal blocks once per thread."""
    kept = OrderedDict()
    # Weak: if an interrupt prevents the reset, the blocks are still freed with this context.
    token = _kept.set(weakref.ref(kept))
    try:
        yield
    finally:
        _kept.reset(token)


def normal_block(rows: int, columns: int, *, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers, which the caller must not change.

    Inside `shared_blocks`, generators in the same state get the same tensor, and each advances as
    if it had drawn. The last `KEPT_BLOCKS` blocks are kept.
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
    """Return standard normal numbers."""
    return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu")


def uniform(*shape: int, generator: torch.Generator) -> Tensor:
    """Return float32 numbers, uniform in [0, 1)."""
    return torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu")


def zeros(*shape: int) -> Tensor:
    """Return float32 zeros, all of them one number in memory. Copy the result before keeping it."""
    return torch.zeros((), dtype=torch.float32, device="cpu").expand(*shape)
