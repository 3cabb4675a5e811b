"""The loss of a causal model on fixed blocks of text, block by block.

Perplexity is exp of the mean loss per token. Two models measured on the same blocks share the
difficulty of the text, so their difference and its standard error are taken block by block.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


def spread(blocks: Int[Tensor, "blocks length"], count: int) -> Int[Tensor, "count length"]:
    """`count` blocks at equal distances, from many texts; all blocks if there are fewer."""
    if count >= len(blocks):
        return blocks
    return blocks[torch.arange(count) * len(blocks) // count]


@torch.no_grad()
def block_losses(
    model: nn.Module, blocks: Int[Tensor, "blocks length"], batch_size: int = 4
) -> Float[Tensor, " blocks"]:
    """The mean loss of each block's tokens after the first, in nats and float64."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    found = []
    for some in blocks.to(device).split(batch_size):
        logits = model(input_ids=some, use_cache=False).logits[:, :-1]
        found.append(losses_of(logits.float(), some).cpu())
    model.train(was_training)
    return torch.cat(found)


def losses_of(
    logits: Float[Tensor, "blocks length-1 words"], blocks: Int[Tensor, "blocks length"]
) -> Float[Tensor, " blocks"]:
    """The mean loss of each block from the logits of all tokens but the last."""
    losses = F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="none")
    return losses.double().mean(1)


def perplexity(losses: Float[Tensor, " blocks"]) -> float:
    """The perplexity of blocks that have one length."""
    return math.exp(float(losses.mean()))


def paired_error(first: Float[Tensor, " blocks"], second: Float[Tensor, " blocks"]) -> float:
    """The standard error of the mean difference; infinite for a single block."""
    if len(first) < 2:
        return math.inf
    return float((first - second).std() / len(first) ** 0.5)
