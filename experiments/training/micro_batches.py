"""Gradient accumulation: a batch in pieces that fit into memory, with the whole batch's gradient.

A batch's loss is a mean over what is learned in it: tokens or texts. Each piece's mean is weighted
by its share of them, so the sum over pieces is the batch's mean, up to the order of summation.
Averaging the pieces' means instead would give more weight to tokens of pieces that have few.
Dropout, where there is any, draws other masks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator

from ..tasks import Task


def pieces(batch: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of `batch`, at most `size` at a time, longest first.

    Rows of similar length are together, and columns of padding on the right are cut off.
    """
    order = batch["attention_mask"].sum(1).argsort(descending=True, stable=True)
    for chosen in order.split(size):
        piece = {key: value[chosen] for key, value in batch.items()}
        width = piece["attention_mask"].shape[1]
        used = int(piece["attention_mask"].any(0).nonzero().max()) + 1
        yield {
            key: value[:, :used] if value.dim() > 1 and value.shape[1] == width else value
            for key, value in piece.items()
        }


def backward(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    task: Task,
    accelerator: Accelerator,
    size: int | None = None,
) -> torch.Tensor:
    """Forward and backward pass of one batch, `size` rows at a time; returns the detached loss."""
    if size is None or size >= len(batch["attention_mask"]):
        return one_pass(model, batch, accelerator)
    counted = [(part, task.counted(part)) for part in pieces(batch, size)]
    # A piece without anything to learn has no mean. A batch of only such pieces has no loss either.
    counted = [(part, count) for part, count in counted if count > 0] or counted[-1:]
    total = sum(count for _, count in counted)
    losses = []
    for part, count in counted[:-1]:
        with accelerator.no_sync(model):  # processes exchange gradients once per batch
            losses.append(one_pass(model, part, accelerator, count / total))
    part, count = counted[-1]
    losses.append(one_pass(model, part, accelerator, count / total))
    return torch.stack(losses).sum()


def one_pass(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    accelerator: Accelerator,
    share: torch.Tensor | None = None,
) -> torch.Tensor:
    """Forward and backward pass of one piece, whose loss is weighted by `share`."""
    with accelerator.autocast():
        loss = model(**batch).loss
    if share is not None:
        loss = loss * share
    accelerator.backward(loss)
    return loss.detach()
