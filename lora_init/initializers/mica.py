"""MiCA: what is learnt may leave the layer through the least used output directions only.

W = U S Vᵀ (thin, min(out, in) triplets); B = the r columns of U that belong to the smallest
singular values, A = 0. The base stays as it is. B is frozen, A alone is trained: half the
parameters of LoRA at the same rank, and the update's columns lie in the span of B for good.

Source: Rüdiger & Raschka, "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning", 2026,
arXiv 2604.01694.
Deviations: the same vectors as PEFT's "mica", which takes a full SVD in float32 and keeps the order
of the whole SVD; ours computes the last ones only, in float64, the smallest first, so that the
factors of rank r are the first r of those of a higher rank. PEFT rounds B to the base's dtype, ours
stays float32. The scaling is not divided out: with A = 0 it sets the pace of training alone.
For out > in the thin SVD's vectors are meant, as in PEFT: W's left null space holds smaller ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer
from lora_init.weights.module_types import MODULE_TYPES


@dataclass
class MicaOptions(Options):
    """MiCA has no settings."""

    frozen = ("lora_B",)


@register_initializer(
    "mica",
    options=MicaOptions,
    paper="Rüdiger & Raschka 2026, arXiv 2604.01694",
    reads=("weight",),
    modules=MODULE_TYPES,
)
@batched
def mica(layer: Layer, options: MicaOptions) -> Factors:
    """A (rank, in) zero, B (out, rank) with orthonormal columns; float32."""
    size = linalg.nesting_rank(layer.rank, min(layer.shape))
    triplets = linalg.bottom_singular(layer.stored_weight, size).leading(layer.rank)
    return Factors(
        lora_A=triplets.left.new_zeros(*layer.stack, layer.rank, layer.shape[1]),
        lora_B=triplets.left,
        metrics={"algorithm": triplets.method, "residual": triplets.residual},
    )
