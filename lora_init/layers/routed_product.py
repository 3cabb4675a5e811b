"""Stand-in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def _gate(module, values):
    if not getattr(module, "has_gate", True):
        return module.act_fn(values)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(values)
    gate, up = values.chunk(2, -1)
    return module.act_fn(gate) * up


def _product(module, name, expert, rows, update):
    weight = getattr(module, name)[expert]
    if getattr(module, "is_transposed", False):
        weight = weight.T
    bias = getattr(module, f"{name}_bias", None)
    out = functional.linear(rows, weight, None if bias is None else bias[expert])
    if update is None:
        return out
    lora_A, lora_B, scaling, *initial = update
    dtype = torch.promote_types(rows.dtype, lora_A.dtype)
    wide = rows.to(dtype)
    delta = functional.linear(
        functional.linear(wide, lora_A[expert].to(dtype)), lora_B[expert].to(dtype)
    )
    if initial:
        A0, B0 = initial
        delta = delta - functional.linear(
            functional.linear(wide, A0[expert].to(dtype)), B0[expert].to(dtype)
        )
    return (out + scaling * delta).to(out.dtype)


def routed_output(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, updates: Any
) -> Tensor:
    first = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
    out = torch.zeros_like(hidden)
    for expert in range(len(module.down_proj)):
        token, place = torch.where(top_k_index == expert)
        if not len(token):
            continue
        rows = _gate(module, _product(module, first, expert, hidden[token], updates.get(first)))
        rows = _product(module, "down_proj", expert, rows, updates.get("down_proj"))
        rows = rows * top_k_weights[token, place, None]
        out = out.index_add(0, token, rows.to(out.dtype))
    return out


def routed_rows(module, hidden, top_k_index, top_k_weights):
    """{matrix: (rows sorted by expert, counts, token of each row)}"""
    first = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
    rows, acts, counts, tokens = [], [], [], []
    for expert in range(len(module.down_proj)):
        token, _ = torch.where(top_k_index == expert)
        counts.append(len(token))
        tokens.append(token)
        rows.append(hidden[token])
        acts.append(_gate(module, _product(module, first, expert, hidden[token], None)))
    counts = torch.tensor(counts)
    return {first: (torch.cat(rows), counts), "down_proj": (torch.cat(acts), counts)}
