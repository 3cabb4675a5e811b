"""MiCA: initialize B with the output directions that W uses least, and A with zero.

W = U S Vᵀ (thin, min(out, in) triplets). B holds the r columns of U with the smallest singular
values; A = 0. The base stays. B is frozen, which halves the trained parameters at the same rank.
The columns of the update always lie in the span of B.

Source: Rüdiger & Raschka, "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning", 2026,
arXiv 2604.01694.
Deviations: the vectors are those of PEFT's "mica", which computes a full SVD in float32 and keeps
its order. This code computes only the last vectors, in float64, the smallest first. So the factors
of rank r are the first r of those of a higher rank. PEFT rounds B to the base's dtype; here it
stays float32. The factors are not divided by the scaling: with A = 0 it changes only the speed of
training. For out > in the vectors are those of the thin SVD, as in PEFT; the left null space of W,
where singular values are 0, is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer, workspace


@dataclass
class MicaOptions(Options):
    """Settings of MiCA: none."""

    frozen = ("lora_B",)


@register_initializer(
    "mica",
    options=MicaOptions,
    paper="Rüdiger & Raschka 2026, arXiv 2604.01694",
    reads=("weight",),
    operations=("product", "convolution", "lookup"),
)
@batched
@workspace(9.0, 0.0)
def mica(layer: Layer, options: MicaOptions) -> Factors:
    """A (rank, in) zero, B (out, rank) with orthonormal columns; float32."""
    size = linalg.nesting_rank(layer.rank, min(layer.shape))
    triplets = linalg.bottom_singular(layer.stored_weight, size).leading(layer.rank)
    return Factors(
        lora_A=triplets.left.new_zeros(*layer.stack, layer.rank, layer.shape[1]),
        lora_B=triplets.left,
        metrics={"algorithm": triplets.method, "residual": triplets.residual},
    )
