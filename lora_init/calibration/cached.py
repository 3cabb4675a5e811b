"""Statistics from the cache: the same model over the same batches is calibrated once.

The key holds every parameter and buffer of the model and every tensor of the batches, so that both
are read once: hundredths of a pass. Only for batches that are all there, a list or a tuple: what a
loader will give cannot be known without using it up, and next time it may give them in another
order. Not for a loss of the user's, whose code has no key, nor under `torch.distributed`, where no
rank sees all of the data.

Results that are larger than the cache's limit are neither copied nor hashed. Where the model and
the method tell so before the pass, the model is not hashed either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.cache import Cache, key
from lora_init.calibration.result import Calibration
from lora_init.distributed import rank_count
from lora_init.registry import CalibrationRequest, sums_dtype

VERSION = 4
"""Of the sums, raised whenever their values change."""


def remembered(
    collect: Callable[[], Calibration],
    cache: Cache | None,
    model: nn.Module,
    shapes: Mapping[str, tuple[int, int]],
    requests: Collection[CalibrationRequest],
    batches: Iterable[Any],
    device: torch.device | None,
) -> Calibration:
    """What `collect` would find, from the cache if it is there; else it is kept there.

    Args:
        shapes: of the targets' weights as (out, in), by name.
    """
    if cache is None or not isinstance(batches, list | tuple) or rank_count() > 1:
        return collect()
    if not cache.has_room(least_bytes(shapes, requests)):
        return collect()
    try:
        name = key(
            "calibration", VERSION, torch.__version__, _described(model), sorted(shapes),
            sorted(map(str, requests)), [_plain(batch) for batch in batches],
            _places(model, device),
        )  # fmt: skip
    except TypeError:  # other things than numbers in a batch, or weights that are offloaded
        return collect()
    entry = cache.get(name)
    if entry is not None:
        # An entry of another form is a miss.
        with contextlib.suppress(ValueError):
            return Calibration.from_tensors(entry.tensors, entry.metadata)
    found = collect()
    cache.put(name, *found.to_tensors())
    return found


def least_bytes(
    shapes: Mapping[str, tuple[int, int]],
    requests: Collection[CalibrationRequest],
) -> int:
    """What the results take at least, as far as it is known before the pass.

    Layers in one module that are equally wide may read one input. Layers in different modules are
    taken to read different ones.
    """
    gradients = [request for request in requests if request.gradients]
    moments = [request for request in requests if not request.gradients]
    widths = {(name.rpartition(".")[0], columns) for name, (_, columns) in shapes.items()}
    of_inputs = sum(sums_dtype(moments).itemsize * width**2 for _, width in widths)
    of_gradients = sum(4 * rows * columns for rows, columns in shapes.values())
    return bool(moments) * of_inputs + len(gradients) * of_gradients


def _described(model: nn.Module) -> list[Any]:
    """The model's code, as far as its classes and settings tell it, and all of its values."""
    config = getattr(model, "config", None)
    return [
        [[name, type(m).__module__, type(m).__qualname__] for name, m in model.named_modules()],
        config.to_json_string() if hasattr(config, "to_json_string") else None,
        dict(model.named_parameters()),
        dict(model.named_buffers()),
    ]


def _places(model: nn.Module, device: torch.device | None) -> list[Any]:
    """Kinds of devices that compute: they round sums differently."""
    sums = None if device is None else device.type
    return [sorted({parameter.device.type for parameter in model.parameters()}), sums]


def _plain(batch: Any) -> Any:
    """A batch, such as a tokenizer's, in the types that a key takes."""
    if hasattr(batch, "keys"):
        return {name: _plain(batch[name]) for name in batch.keys()}  # noqa: SIM118
    if isinstance(batch, list | tuple):
        return [_plain(part) for part in batch]
    return batch.detach() if isinstance(batch, Tensor) else batch
