"""Cache calibration statistics, so that the same model and batches are calibrated once.

The key hashes all parameters and buffers of the model and all tensors of the batches. That reads
both once, which is much cheaper than a forward pass. The cache is skipped

- for a loader or a generator: its batches cannot be hashed without consuming them;
- for a loss function of the user, whose code cannot be hashed;
- under `torch.distributed`, where a rank sees only part of the data.

Results larger than the cache's limit are not stored. Where their size is known before the pass,
the model is not hashed either.
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
"""Version of the sums in the cache key. Increase it whenever their values change."""


def remembered(
    collect: Callable[[], Calibration],
    cache: Cache | None,
    model: nn.Module,
    shapes: Mapping[str, tuple[int, int]],
    requests: Collection[CalibrationRequest],
    batches: Iterable[Any],
    device: torch.device | None,
) -> Calibration:
    """Return the result of `collect` from the cache, or compute it and store it there.

    Args:
        shapes: (out, in) of the targets' weights, by name.
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
    except TypeError:  # a batch holds objects that cannot be hashed, or weights are offloaded
        return collect()
    entry = cache.get(name)
    if entry is not None:
        # An entry in an older format counts as a miss.
        with contextlib.suppress(ValueError):
            return Calibration.from_tensors(entry.tensors, entry.metadata)
    found = collect()
    cache.put(name, *found.to_tensors())
    return found


def least_bytes(
    shapes: Mapping[str, tuple[int, int]],
    requests: Collection[CalibrationRequest],
) -> int:
    """Lower bound of the size of the results in bytes, known before the pass.

    Layers of equal width in one module may read the same input and count once. Layers in different
    modules count as reading different inputs.
    """
    gradients = [request for request in requests if request.gradients]
    moments = [request for request in requests if request.inputs]
    widths = {(name.rpartition(".")[0], columns) for name, (_, columns) in shapes.items()}
    of_inputs = sum(sums_dtype(moments).itemsize * width**2 for _, width in widths)
    of_gradients = sum(4 * rows * columns for rows, columns in shapes.values())
    return bool(moments) * of_inputs + len(gradients) * of_gradients


def _described(model: nn.Module) -> list[Any]:
    """The model's classes, configuration and values, for the cache key."""
    config: Any = getattr(model, "config", None)
    return [
        [[name, type(m).__module__, type(m).__qualname__] for name, m in model.named_modules()],
        config.to_json_string() if hasattr(config, "to_json_string") else None,
        dict(model.named_parameters()),
        dict(model.named_buffers()),
    ]


def _places(model: nn.Module, device: torch.device | None) -> list[Any]:
    """The device types that compute. They are in the key because they round sums differently."""
    sums = None if device is None else device.type
    return [sorted({parameter.device.type for parameter in model.parameters()}), sums]


def _plain(batch: Any) -> Any:
    """Convert a batch, such as a tokenizer's output, to types that a cache key accepts."""
    if hasattr(batch, "keys"):
        return {name: _plain(batch[name]) for name in batch.keys()}  # noqa: SIM118
    if isinstance(batch, list | tuple):
        return [_plain(part) for part in batch]
    return batch.detach() if isinstance(batch, Tensor) else batch
