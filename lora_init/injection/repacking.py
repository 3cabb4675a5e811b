"""Prevent bitsandbytes from repacking 4-bit weights while a model has an adapter.

On some CPUs an eval forward repacks the weights in place, rounds their scales, and blocks the
gradient to earlier layers (see `lora_init.weights.bitsandbytes`). A model that is calibrated in
eval mode and then trained needs plain weights in all 4-bit modules, adapted or not.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from lora_init.injection.transaction import Transaction
from lora_init.weights import bitsandbytes


def hold_plain(
    model: nn.Module, transaction: Transaction | None = None
) -> dict[nn.Module, bitsandbytes.Held]:
    """Make every packed module plain; return the previous states for `release`."""
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
    """Restore the modules' weights and bitsandbytes' default behavior."""
    for module, one in held.items():
        if transaction is not None:
            transaction.weight(module)
        bitsandbytes.put_back(module, one)
