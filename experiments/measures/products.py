"""Norms of low-rank products, from their factors alone.

‖B A‖² = tr(Bᵀ B A Aᵀ), of two r × r Gram matrices, in float64: 2 r² (out + in) operations.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.layers import LoraLayer


@torch.no_grad()
def product_norm(lora_B: Float[Tensor, "out rank"], lora_A: Float[Tensor, "rank in"]) -> float:
    """‖B A‖ (Frobenius)."""
    lora_B, lora_A = lora_B.double(), lora_A.double()
    square = ((lora_B.T @ lora_B) * (lora_A @ lora_A.T)).sum()
    return float(square.clamp_min(0).sqrt())  # rounding can make a tiny one negative


@torch.no_grad()
def update_norm(layer: LoraLayer) -> float:
    """‖s (B A - B0 A0)‖ (Frobenius), the change by training, without DoRA's magnitudes.

    It uses B A - B0 A0 = [B - B0, B0] [A; A - A0]. The form [B, -B0] [A; A0] has the same norm, but
    for small updates its Gram matrices cancel.
    """
    lora_A, lora_B = layer.lora_A.double(), layer.output_factor.double()
    initial_A, initial_B = layer.initial_lora_A.double(), layer.initial_lora_B.double()
    left = torch.cat([lora_B - initial_B, initial_B], dim=1)
    right = torch.cat([lora_A, lora_A - initial_A])
    return layer.scaling * product_norm(left, right)
