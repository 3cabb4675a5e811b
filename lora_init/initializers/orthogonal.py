"""Initialize both factors with random numbers whose product B A is exactly zero.

Q is a random orthogonal r × r matrix; Q_odd and Q_even (r/2 × r) are its odd and even rows.
N1 (r/2 × in) and N2 (out × r/2) are standard normal. Then

    A = Q_oddᵀ N1 / 10,    B = N2 Q_even / 10,    B A = N2 (Q_even Q_oddᵀ) N1 / 100 = 0,

so the output is preserved, and both factors receive a gradient from the first step on. The rank r
must be even.

Source: Datta Nimmaturi, "Rethinking LoRA initialisation", datta0.github.io. The 1/10 is a heuristic
of that text. PEFT's "orthogonal" is the same construction.
Deviations: none in the formula. B A is zero up to the float32 rounding of the factors. Factors in
bfloat16 would have a much larger error, which is one reason why adapters are float32 by default.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.linalg.draws import normal
from lora_init.registry import Options, register_initializer


@dataclass
class OrthogonalOptions(Options):
    """Settings of "orthogonal": none."""

    def refuse_rank(self, rank: int, shape: tuple[int, int]) -> str | None:
        if rank % 2 == 0:
            return None
        return "orthogonal splits r basis vectors into two halves, so r must be even"


@register_initializer(
    "orthogonal",
    options=OrthogonalOptions,
    paper="D. Nimmaturi, datta0.github.io",
    operations=("product", "convolution", "lookup"),
)
def orthogonal(layer: Layer, options: OrthogonalOptions) -> Factors:
    """A (rank, in), B (out, rank), float32, with B A = 0."""
    (rows, columns), rank, generator = layer.shape, layer.rank, layer.generator
    # The factors are multiplied in float64 and rounded once, so B A is zero up to float32 rounding.
    # The normal numbers are drawn in float32, which is much faster than float64.
    square = normal(rank, rank, generator=generator, dtype=torch.float64)
    basis, upper = torch.linalg.qr(square)
    basis = basis * torch.sign(torch.diagonal(upper))  # Haar, whatever LAPACK's signs
    first = normal(rank // 2, columns, generator=generator).double()
    second = normal(rows, rank // 2, generator=generator).double()
    lora_A = basis[1::2].T @ first / 10
    lora_B = second @ basis[0::2] / 10
    return Factors(lora_A.float(), lora_B.float())
