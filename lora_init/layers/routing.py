"""The pairs of a token and an expert that a router selects, sorted by expert."""

from __future__ import annotations

from typing import Any, NamedTuple

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
        inverse: the row of each pair.
        top_k: pairs per token.
    """

    tokens: Int[Tensor, " positions"]
    experts: Int[Tensor, " positions"]
    offsets: Int32[Tensor, " experts"]
    ends: Int32[Tensor, " experts"]
    order: Int[Tensor, " positions"]
    inverse: Int[Tensor, " positions"]
    top_k: int


class _Gathered(torch.autograd.Function):
    """rows[index], where the gradient is gathered too.

    Each row is gathered `times` times. Row i is at ``inverse[i * times : (i + 1) * times]``.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, times: int
    ) -> Float[Tensor, "positions columns"]:
        ctx.save_for_backward(inverse)
        ctx.times = times
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        (inverse,) = ctx.saved_tensors
        by_row = gradient.index_select(0, inverse)
        if ctx.times > 1:
            by_row = by_row.unflatten(0, (len(by_row) // ctx.times, ctx.times)).sum(1)
        return by_row, None, None, None


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
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    top_k = top_k_index.shape[-1]
    last = experts.clamp(max=count - 1)
    return Routing(order // top_k, last, offsets, ends, order, inverse, top_k)


def routed_tokens(
    routed: Routing, hidden: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "positions hidden"]:
    """The token of each row."""
    return _Gathered.apply(hidden, routed.tokens, routed.inverse, routed.top_k)


def combined(
    routed: Routing,
    outputs: Float[Tensor, "positions out"],
    top_k_weights: Float[Tensor, "tokens top_k"],
    dtype: torch.dtype,
) -> Float[Tensor, "tokens out"]:
    """The sum of each token's outputs, times the weights of its pairs, in this dtype."""
    weighted = outputs * top_k_weights.reshape(-1)[routed.order].unsqueeze(-1)
    by_pair = _Gathered.apply(weighted, routed.inverse, routed.order, 1)
    by_token = by_pair.unflatten(0, (len(by_pair) // routed.top_k, routed.top_k))
    return by_token.sum(1).to(dtype)
