"""Keeping bitsandbytes from repacking 4-bit weights while a model has an adapter.

On some CPUs an evaluation forward repacks them in place, rounds their scales, and cuts the
gradient to everything before them (see `lora_init.weights.bitsandbytes`). A model that calibrates
in eval mode
and then trains needs all of its 4-bit modules plain, adapted or not.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from lora_init.injection.transaction import Transaction
from lora_init.weights import bitsandbytes


def hold_plain(
    model: nn.Module, transaction: Transaction | None = None
) -> dict[nn.Module, bitsandbytes.Held]:
    """Make every packed module plain; returns what they were, for `release`."""
    modules = [module for module in model.modules() if bitsandbytes.is_quantized(module)]
    held = {module: bitsandbytes.held(module) for module in modules}
    if transaction is not None:
        transaction.undo_by(partial(release, held))
    for module in modules:
        bitsandbytes.keep_plain(module)
    return held


def release(
    held: dict[nn.Module, bitsandbytes.Held], transaction: Transaction | None = None
) -> None:
    """Give the modules back their weights and bitsandbytes' own habit."""
    for module, one in held.items():
        if transaction is not None:
            transaction.weight(module)
        bitsandbytes.put_back(module, one)
