"""The forward pass of mixture-of-experts modules with low-rank updates of their matrices.

Expert e computes ``W_e x + s B_e A_e x`` for the tokens that the router sends to it. Rows are
sorted by expert once, and an update is two more grouped products with r columns. No tensor of the
size of the experts' weights is formed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_init.layers.grouped_product import grouped_product
from lora_init.layers.grouped_sum import grouped_sum
from lora_init.layers.low_rank_sum import wide_dtype
from lora_init.layers.routing import Routing, combined, routed_tokens, routing
from lora_init.weights.experts import (
    DOWN,
    first_projection,
    implementation,
    is_transposed,
    unknown_implementation,
)

Rows = Float[Tensor, "positions in"]
Watch = Callable[[str, Tensor, Tensor], None]
"""Gets the name of a matrix, its outputs (positions, out), and the expert of each position. The
number of experts there means that the router did not send the position to this expert."""


class Update(NamedTuple):
    """The update ``s B_e A_e`` of one matrix of each expert.

    Attributes:
        lora_A: (experts, rank, in).
        lora_B: (experts, out, rank). With a core R, B R.
        scaling: s.
        initial_A, initial_B: A0 and B0 if ``s B0 A0`` is subtracted, of the same shapes.
        dropout: applied to the rows that A reads. None while evaluating.
    """

    lora_A: Float[Tensor, "experts rank in"]
    lora_B: Float[Tensor, "experts out rank"]
    scaling: float
    initial_A: Float[Tensor, "experts rank in"] | None = None
    initial_B: Float[Tensor, "experts out rank"] | None = None
    dropout: Callable[[Tensor], Tensor] | None = None


def routed_call(
    module: nn.Module,
    updates: Mapping[str, Update],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    watch: Watch | None = None,
) -> Float[Tensor, "tokens hidden"]:
    """`routed_output` with the arguments of a call of the module."""
    if kwargs:
        args = inspect.signature(type(module).forward).bind(module, *args, **kwargs).args[1:]
    given: tuple[Any, ...] = (*args, None, None)
    hidden, index, weights = given[:3]
    return routed_output(module, hidden, index, weights, updates, watch)


def routed_output(
    module: nn.Module,
    hidden: Float[Tensor, "tokens hidden"],
    top_k_index: Int[Tensor, "tokens top_k"] | None,
    top_k_weights: Float[Tensor, "tokens top_k"] | None,
    updates: Mapping[str, Update],
    watch: Watch | None = None,
) -> Float[Tensor, "tokens hidden"]:
    """The output of a module of experts whose matrices have these updates.

    Base products follow the experts implementation that the module's configuration selects, and
    its rules for autocast. Updates are computed in the widest dtype of the rows and the factors,
    at least float32; in bfloat16 on a GPU if the rows are bfloat16.

    Args:
        module: a module that `ExpertsFormat` supports.
        hidden: the tokens. For Llama-4, one copy of them for each expert, one after the other.
        top_k_index: the experts of each token. A number of experts or more means no expert.
        top_k_weights: their weights. Both are None for Llama-4.
        updates: by the name of the matrix, such as "down_proj".
        watch: sees the outputs of each matrix.

    Raises:
        RuntimeError: the selected experts implementation is not known.
    """
    if (reason := unknown_implementation(module)) is not None:
        raise RuntimeError(f"a {type(module).__name__} {reason}")
    first = first_projection(module)
    if top_k_index is None or top_k_weights is None:
        return _of_all_tokens(module, hidden, updates, watch)
    routed = routing(top_k_index, len(getattr(module, DOWN)))
    weights = top_k_weights.masked_fill(top_k_index >= len(routed.offsets), 0)
    rows = routed_tokens(routed, hidden)
    states = _projected(module, first, rows, routed, updates.get(first), watch)
    states = _projected(module, DOWN, activated(module, states), routed, updates.get(DOWN), watch)
    if getattr(module, "has_post_expert_norm", False):
        norm: Any = module.post_expert_norm
        states = norm(states)
    return combined(routed, states, weights, hidden.dtype)


def activated(module: Any, states: Float[Tensor, "*positions out"]) -> Tensor:
    """Apply the module's activation, with its gate if it has one."""
    if first_projection(module) == "up_proj":
        return module.act_fn(states)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(states)
    gate, up = states.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def product_stack(module: nn.Module, name: str) -> Float[Tensor, "experts inner out"]:
    """A view of the stored matrices, for products with rows from the left."""
    stored = getattr(module, name)
    return stored if is_transposed(module) else stored.transpose(1, 2)


def _projected(
    module: nn.Module,
    name: str,
    rows: Rows,
    routed: Routing,
    given: Update | None,
    watch: Watch | None,
) -> Float[Tensor, "positions out"]:
    """W_e x + s B_e A_e x + bias_e, row by row."""
    stack, ends, kind = product_stack(module, name), routed.ends, implementation(module)
    if kind == "grouped_mm":  # the module's own products ignore autocast, too
        rows = rows.to(stack.dtype)
    if kind == "batched_mm":
        states = torch.bmm(rows.unsqueeze(1), stack[routed.experts]).squeeze(1)
    elif kind == "eager" and torch.is_autocast_enabled(rows.device.type):
        states = _one_by_one(rows, stack, ends)
    elif given is None or given.dropout is not None or _update_dtype(rows, given) != stack.dtype:
        states = grouped_product(rows, stack, ends)
    else:
        states = grouped_sum(rows, stack, *factors(given, stack.dtype), ends, given.scaling)
        given = None
    if given is not None:
        states = (states + low_rank(rows, given, ends)).to(states.dtype)
    bias = getattr(module, f"{name}_bias", None)
    states = states if bias is None else states + bias[routed.experts]
    if watch is not None:
        watch(name, states, routed.experts)
    return states


def _one_by_one(rows: Rows, stack: Tensor, ends: Tensor) -> Tensor:
    """One product per expert, in the dtype that autocast selects."""
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    parts = zip(rows.split(sizes), stack, strict=True)
    found = [part @ matrix for part, matrix in parts if len(part)]
    return torch.cat(found) if found else rows @ stack[0]


def _of_all_tokens(
    module: nn.Module,
    hidden: Float[Tensor, "tokens hidden"],
    updates: Mapping[str, Update],
    watch: Watch | None,
) -> Float[Tensor, "tokens hidden"]:
    """The output of Llama-4's experts, which all read equally many rows."""
    rows = hidden
    for name in (first_projection(module), DOWN):
        stack = product_stack(module, name)
        states = torch.bmm(rows.view(len(stack), -1, rows.shape[-1]), stack).flatten(0, 1)
        if (update := updates.get(name)) is not None:
            states = (states + low_rank(rows, update, None)).to(states.dtype)
        if watch is not None:
            watch(name, states, _selected_by(hidden, len(stack)))
        rows = states if name == DOWN else activated(module, states)
    return rows


def _selected_by(hidden: Float[Tensor, "tokens hidden"], count: int) -> Int[Tensor, " tokens"]:
    """The expert of each row. Llama-4 multiplies tokens that the router did not select by zero."""
    experts = torch.arange(count, device=hidden.device).repeat_interleave(len(hidden) // count)
    return experts.masked_fill(~hidden.detach().any(dim=-1), count)


def low_rank(rows: Rows, update: Update, offsets: Tensor | None) -> Float[Tensor, "positions out"]:
    """s B_e A_e x - s B0_e A0_e x, row by row. Exactly zero if A is A0 and B is B0.

    Args:
        offsets: where the rows of each expert end. None if all experts have equally many.
    """
    if update.dropout is not None:
        trained = Update(update.lora_A, update.lora_B, update.scaling)
        delta = low_rank(update.dropout(rows), trained, offsets)
        if update.initial_A is None or update.initial_B is None:
            return delta
        # The base and the subtracted product read the whole rows.
        start = Update(update.initial_A, update.initial_B, update.scaling)
        return delta - low_rank(rows, start, offsets)
    dtype = _update_dtype(rows, update)
    lora_A, lora_B = factors(update, dtype)
    return _product(_product(rows.to(dtype), lora_A, offsets) * update.scaling, lora_B, offsets)


def factors(
    update: Update, dtype: torch.dtype
) -> tuple[Float[Tensor, "experts inner rank"], Float[Tensor, "experts rank out"]]:
    """Factors of B A - B0 A0 = (B - B0) A + B0 (A - A0) for products with rows from the left."""
    lora_A, lora_B = update.lora_A, update.lora_B
    if update.initial_A is not None and update.initial_B is not None:
        lora_A = torch.cat([lora_A, lora_A - update.initial_A], 1)
        lora_B = torch.cat([lora_B - update.initial_B, update.initial_B], 2)
    return lora_A.to(dtype).transpose(1, 2), lora_B.to(dtype).transpose(1, 2)


def _product(rows: Rows, stack: Tensor, offsets: Tensor | None) -> Tensor:
    if offsets is not None:
        return grouped_product(rows, stack, offsets)
    return torch.bmm(rows.view(len(stack), -1, rows.shape[-1]), stack).flatten(0, 1)


def _update_dtype(rows: Rows, update: Update) -> torch.dtype:
    """The dtype of the products with the factors."""
    is_half = rows.is_cuda and rows.dtype is torch.bfloat16
    return rows.dtype if is_half else wide_dtype(rows, update.lora_A)
