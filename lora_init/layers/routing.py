"""The pairs of a token and an expert that a router selects, sorted by expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor


class Routing(NamedTuple):
    """Pairs (token, expert), sorted by expert. Expert e has the rows before ``offsets[e]``.

    Attributes:
        tokens: the token of each row.
        experts: the expert of each row.
        offsets: where the rows of each expert end.
        ends: the same, where the last expert also has the rows of pairs without an expert.
        order: the pair, in the router's order, of each row.
        top_k: pairs per token.
    """

    tokens: Int[Tensor, " positions"]
    experts: Int[Tensor, " positions"]
    offsets: Int32[Tensor, " experts"]
    ends: Int32[Tensor, " experts"]
    order: Int[Tensor, " positions"]
    top_k: int


def routing(top_k_index: Int[Tensor, "tokens top_k"], count: int) -> Routing:
    """Sort a router's selection by expert.

    Args:
        top_k_index: the experts of each token. An index of `count` or more means no expert: these
            pairs follow those of the last expert, and `experts` is the last one for them.
        count: the number of experts.
    """
    experts, order = torch.sort(top_k_index.reshape(-1))
    numbers = torch.arange(count, device=experts.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts, numbers, right=True).int()
    ends = torch.cat([offsets[:-1], offsets.new_full((1,), len(order))])
    top_k = top_k_index.shape[-1]
    return Routing(order // top_k, experts.clamp(max=count - 1), offsets, ends, order, top_k)


def combined(
    routed: Routing,
    outputs: Float[Tensor, "positions out"],
    top_k_weights: Float[Tensor, "tokens top_k"],
    dtype: torch.dtype,
) -> Float[Tensor, "tokens out"]:
    """The sum of each token's outputs, times the weights of its pairs, in this dtype."""
    weighted = outputs * top_k_weights.reshape(-1)[routed.order].unsqueeze(-1)
    inverse = torch.empty_like(routed.order)
    inverse[routed.order] = torch.arange(len(inverse), device=inverse.device)
    by_token = weighted[inverse].view(-1, routed.top_k, outputs.shape[-1])
    return by_token.sum(1).to(dtype)
