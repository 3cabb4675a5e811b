"""Statistics from the cache: the same model over the same batches is calibrated once.

The key holds every parameter and buffer of the model and every tensor of the batches, so that both
are read once: hundredths of a pass. Only for batches that are all there, a list or a tuple: what a
loader will give cannot be known without using it up, and next time it may give them in another
order. Not for a loss of the user's, whose code has no key, nor under `torch.distributed`, where no
rank sees all of the data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.cache import Cache, key
from lora_init.calibration import Calibration
from lora_init.reduction import rank_count
from lora_init.registry import CalibrationRequest

VERSION = 2
"""Of the sums, raised whenever their values change."""


def remembered(
    collect: Callable[[], Calibration],
    cache: Cache | None,
    model: nn.Module,
    names: Iterable[str],
    requests: Collection[CalibrationRequest],
    batches: Iterable[Any],
    sketch: int | None,
) -> Calibration:
    """What `collect` would find, from the cache if it is there; else it is kept there."""
    if cache is None or not isinstance(batches, list | tuple) or rank_count() > 1:
        return collect()
    try:
        name = key(
            "calibration", VERSION, torch.__version__, _described(model), sorted(names),
            sorted(map(str, requests)), sketch, [_plain(batch) for batch in batches],
        )  # fmt: skip
    except TypeError:  # a batch of something else than numbers and tensors
        return collect()
    entry = cache.get(name)
    if entry is not None:
        # An entry of another form is a miss.
        with contextlib.suppress(ValueError):
            return Calibration.from_tensors(entry.tensors, entry.metadata)
    found = collect()
    cache.put(name, *found.to_tensors())
    return found


def _described(model: nn.Module) -> list[Any]:
    """The model's code, as far as its classes and settings tell it, and all of its values."""
    config = getattr(model, "config", None)
    return [
        [[name, type(m).__module__, type(m).__qualname__] for name, m in model.named_modules()],
        config.to_json_string() if hasattr(config, "to_json_string") else None,
        dict(model.named_parameters()),
        dict(model.named_buffers()),
    ]


def _plain(batch: Any) -> Any:
    """A batch, such as a tokenizer's, in the types that a key takes."""
    if hasattr(batch, "keys"):
        return {name: _plain(batch[name]) for name in batch.keys()}  # noqa: SIM118
    if isinstance(batch, list | tuple):
        return [_plain(part) for part in batch]
    return batch.detach() if isinstance(batch, Tensor) else batch
