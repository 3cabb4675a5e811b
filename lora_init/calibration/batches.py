"""Calibration batches: check their type, run them through a model, and compute their loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lora_init.linalg.transfer import on_host
from lora_init.progress import tracked


@dataclass(frozen=True)
class WithLoss:
    """Calibration batches with a loss function, for a model that does not return a loss.

    Attributes:
        batches: any iterable.
        loss: ``(model, batch) -> loss``, a scalar; the batch is on the model's device.
    """

    batches: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Counted:
    """Count batches and tokens while they are iterated over.

    Attributes:
        count: number of batches so far.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.count = 0
        self._tokens: list[Tensor] = []
        self._batches = batches

    @property
    def tokens(self) -> int:
        """Number of unmasked tokens. Reading it waits for the device of the masks."""
        return sum(on_host(self._tokens))

    def __iter__(self) -> Iterator[Any]:
        for batch in tracked(self._batches, "calibrating"):
            self.count += 1
            self._tokens.append(token_count(batch))
            yield batch


def home(model: nn.Module) -> torch.device:
    """The device of a model's inputs: that of its first parameter that is not offloaded."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def moved(batch: Any, device: torch.device) -> Any:
    """Move the batch's tensors to `device`. Mappings become dicts, sequences become lists."""
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [moved(value, device) for value in batch]
    if not isinstance(batch, Tensor):
        return batch
    # Inference tensors have no version counter, which detects in-place writes: copy them.
    # Copies from pageable memory do not wait for the GPU's queued work. A pinned buffer could be
    # refilled with the next batch before the copy has read it.
    ahead = batch.device.type == "cpu" and device.type == "cuda" and not batch.is_pinned()
    return batch.to(device, copy=batch.is_inference(), non_blocking=ahead)


def forward(model: nn.Module, batch: Any) -> Any:
    """Call the model: a dict holds keyword arguments, a list positional arguments."""
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, list):
        return model(*batch)
    return model(batch)


def token_count(batch: Any) -> Int[Tensor, ""]:
    """Count the unmasked tokens of a tokenizer's batch; 0 for any other batch."""
    fields = batch if isinstance(batch, Mapping) else {}
    mask, ids = fields.get("attention_mask"), fields.get("input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.bool().sum()
    return torch.tensor(ids.numel() if isinstance(ids, Tensor) else 0, device="cpu")


BATCHES = (
    "must be an iterable of batches, e.g. a list of tokenizer outputs or a DataLoader. Put one "
    "batch into a list: [batch]."
)


def check_batches(batches: Any, setting: str = "calibration") -> None:
    """Raise if `batches` is a single batch, a string or anything that cannot be iterated over.

    None passes, because only some methods need batches.

    Raises:
        TypeError: names the setting and the fix.
    """
    if isinstance(batches, WithLoss):
        batches, setting = batches.batches, f"{setting}.batches"
    single = isinstance(batches, Mapping | Tensor | str | bytes)
    if single or not (batches is None or _iterates(batches)):
        shown = f"a {type(batches).__name__}" if single else repr(batches)
        raise TypeError(f"{setting}={shown} is not supported: {BATCHES}")


def _iterates(batches: Any) -> bool:
    return hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")


def check_count(count: int) -> None:
    """Raise if there was no batch.

    Raises:
        ValueError: `count` is 0.
    """
    if count == 0:
        raise ValueError(
            "calibration: the iterable gave no batch; pass a non-empty list or loader (a generator "
            "that was used before is empty)"
        )
