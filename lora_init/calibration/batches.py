"""Calibration batches: what they may be, how they run through a model, and what their loss is."""

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
    """Calibration batches for a model that returns no loss of its own.

    Attributes:
        batches: any iterable.
        loss: ``(model, batch) -> loss``, a scalar; the batch is on the model's device.
    """

    batches: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Counted:
    """Batches that are counted as they pass.

    Attributes:
        count: how many batches have passed.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.count = 0
        self._tokens: list[Tensor] = []
        self._batches = batches

    @property
    def tokens(self) -> int:
        """How many unmasked tokens they held. Only this property waits for the masks' device."""
        return sum(on_host(self._tokens))

    def __iter__(self) -> Iterator[Any]:
        for batch in tracked(self._batches, "calibrating"):
            self.count += 1
            self._tokens.append(token_count(batch))
            yield batch


def home(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first parameter that is not offloaded."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`, mappings as dicts and sequences as lists."""
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [moved(value, device) for value in batch]
    if not isinstance(batch, Tensor):
        return batch
    # A tensor made in inference mode has no version, by which in-place writes are noticed.
    # From pageable memory the host waits for the copy alone, and not for the device's work. A
    # pinned buffer could be filled with the next batch before it is read.
    ahead = batch.device.type == "cpu" and device.type == "cuda" and not batch.is_pinned()
    return batch.to(device, copy=batch.is_inference(), non_blocking=ahead)


def forward(model: nn.Module, batch: Any) -> Any:
    """The model's output: a dict is its keyword arguments, a list the positional ones."""
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, list):
        return model(*batch)
    return model(batch)


def token_count(batch: Any) -> Int[Tensor, ""]:
    """Unmasked tokens of a tokenizer's batch, on the device of its mask; 0 for any other."""
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
    """Refuse what is not an iterable of batches: one batch, a string, a number.

    None passes: whether a method needs batches is known later.

    Raises:
        TypeError: by name, with the fix.
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
    """Refuse data without a batch.

    Raises:
        ValueError: `count` is 0.
    """
    if count == 0:
        raise ValueError(
            "calibration: the iterable gave no batch; pass a non-empty list or loader (a generator "
            "that was used before is empty)"
        )
