"""The rows that each expert's matrices are multiplied by, for statistics of their inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_init.layers.routed_product import activated, product_stack
from lora_init.layers.routing import routing
from lora_init.weights.experts import DOWN, first_projection


class ExpertRows(NamedTuple):
    """What one expert reads in one call of its module.

    Attributes:
        expert: the number of the expert.
        tokens: the position of each row's token in the module's input.
        rows: by the name of the matrix, one row per token.
    """

    expert: int
    tokens: Int[Tensor, " positions"]
    rows: dict[str, Float[Tensor, "positions inner"]]


def routed_rows(
    module: nn.Module,
    hidden: Float[Tensor, "tokens hidden"],
    top_k_index: Int[Tensor, "tokens top_k"] | None,
) -> Iterator[ExpertRows]:
    """Yield what each expert reads, expert by expert. Those without rows are left out.

    The first matrix reads the tokens that the router selects, `down_proj` their activations. These
    are computed again from the module's weights, without adapters and without a graph. Memory is
    bounded by the rows of one expert.

    Args:
        module: a module that `ExpertsFormat` supports, with its weights in memory.
        hidden: the tokens that the module was called with. For Llama-4, one copy per expert, in
            which the rows that the router did not select are zero.
        top_k_index: the experts of each token; None for Llama-4.
    """
    first = first_projection(module)
    stack = product_stack(module, first)
    bias = getattr(module, f"{first}_bias", None)
    if top_k_index is None:
        # Llama-4 multiplies the tokens that the router did not select by a score of zero.
        is_selected = hidden.detach().any(dim=-1).chunk(len(stack))
        first_rows = range(0, len(hidden), len(is_selected[0]))
        groups = [
            start + chosen.nonzero()[:, 0]
            for start, chosen in zip(first_rows, is_selected, strict=True)
        ]
    else:
        routed = routing(top_k_index, len(stack))
        sizes = torch.diff(routed.offsets, prepend=routed.offsets.new_zeros(1)).tolist()
        groups = routed.tokens[: sum(sizes)].split(sizes)
    for expert, tokens in enumerate(groups):
        if len(tokens):
            with torch.no_grad():
                rows = hidden[tokens]
                states = rows @ stack[expert]
                states = states if bias is None else states + bias[expert]
                both = {first: rows, DOWN: activated(module, states)}
            yield ExpertRows(expert, tokens, both)
