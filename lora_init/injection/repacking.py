"""Prevent bitsandbytes from repacking 4-bit weights while a model has an adapter.

On some CPUs an eval forward repacks the weights in place, rounds their scales, and blocks the
gradient to earlier layers (see `lora_init.weights.linear4bit`). A model that is calibrated in
eval mode and then trained needs plain weights in all 4-bit modules, adapted or not.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from lora_init.injection.transaction import Transaction
from lora_init.weights.format import Held
from lora_init.weights.kinds import class_format, known_format


def hold_plain(model: nn.Module, transaction: Transaction | None = None) -> dict[nn.Module, Held]:
    """Make every packed module plain; return the previous states for `release`."""
    formats = {module: class_format(module) for module in model.modules()}
    packed = {m: one for m, one in formats.items() if one and one.changes_in_forward(m)}
    held = {module: one.hold(module) for module, one in packed.items()}
    if transaction is not None:
        transaction.undo_by(partial(release, held))
    for module, one in packed.items():
        one.keep_plain(module)
    return held


def release(held: dict[nn.Module, Held], transaction: Transaction | None = None) -> None:
    """Restore the modules' weights and bitsandbytes' default behavior."""
    for module, one in held.items():
        if transaction is not None:
            transaction.weight(module)
        known_format(module).put_back(module, one)
