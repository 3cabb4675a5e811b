"""Forgetting: how far the trained model is from the original base on held-out texts.

- Causal models: the mean KL(original ‖ trained) of the next-token distributions, in nats, over all
  positions without padding.
- Classifiers: 1 - cosine of the representations below the head, averaged over each text's tokens
  and then over texts. Their head is new, so outputs cannot be compared.

The original is the base before the initialization, not the residual that a subtracting method
trains on, and not the quantized weights of a replacing one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..tasks import Task
from .original_model import OriginalModel

KINDS = {
    "CAUSAL_LM": "mean KL(original || trained) of next tokens, nats",
    "SEQ_CLS": "1 - mean cosine of pooled representations",
}


@torch.no_grad()
def forgetting(
    original: OriginalModel, task_type: str, task: Task, examples: Sequence[Any], batch_size: int
) -> float | None:
    """The measure of `KINDS[task_type]`; None without examples."""
    compare = token_divergence if task_type == "CAUSAL_LM" else pooled_distance
    adapted = original.adapted
    was_training = adapted.training
    adapted.eval()
    total, count = 0.0, 0
    for batch, mask in batches(task, examples, batch_size):
        with original.active() as base:
            base.eval()
            before = outputs(base, batch, task_type)
        after = outputs(adapted.get_base_model(), batch, task_type)
        values = compare(before, after, mask.to(after.device))
        total, count = total + float(values.sum()), count + len(values)
    adapted.train(was_training)
    # Rounding can make it slightly negative.
    return max(total / count, 0.0) if count else None


def batches(
    task: Task, examples: Sequence[Any], batch_size: int
) -> Iterator[tuple[dict[str, Tensor], Bool[Tensor, "batch length"]]]:
    """Model inputs without labels, and a mask without padding."""
    for start in range(0, len(examples), batch_size):
        batch = task.collate(examples[start : start + batch_size])
        batch.pop("labels")
        yield batch, batch["attention_mask"].bool()


def outputs(model: nn.Module, batch: dict[str, Tensor], task_type: str) -> Tensor:
    """Logits of a causal model; else the body's last hidden states. (batch, length, size)."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items()}
    if task_type == "CAUSAL_LM":
        return model(**inputs).logits
    return model.base_model(**inputs).last_hidden_state


def token_divergence(
    before: Float[Tensor, "batch length words"],
    after: Float[Tensor, "batch length words"],
    mask: Bool[Tensor, "batch length"],
) -> Float[Tensor, " positions"]:
    """KL(before ‖ after) in nats at each unmasked position, in float64, one text at a time."""
    found = []
    for first, second, valid in zip(before.to(after.device), after, mask, strict=True):
        old = F.log_softmax(first[valid].double(), -1)
        new = F.log_softmax(second[valid].double(), -1)
        found.append(F.kl_div(new, old, log_target=True, reduction="none").sum(-1))
    return torch.cat(found)


def pooled_distance(
    before: Float[Tensor, "batch length width"],
    after: Float[Tensor, "batch length width"],
    mask: Bool[Tensor, "batch length"],
) -> Float[Tensor, " batch"]:
    """1 - cosine of each text's mean representation, in float64."""
    weight = mask[..., None].double()
    # A sum instead of a mean: the cosine does not depend on the scale.
    first, second = ((x.to(mask.device).double() * weight).sum(1) for x in (before, after))
    return 1 - F.cosine_similarity(first, second, dim=-1)
