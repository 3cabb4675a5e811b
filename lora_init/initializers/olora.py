"""OLoRA: initialize the adapter from the first r columns of the QR decomposition of W.

W = Q R; B = Q[:, :r], A = R[:r]; the base becomes W - s B A. The first r columns of Q depend only
on the first r columns of W. So Q = qr(W[:, :r]), A = Qᵀ W gives the same factors as the full
decomposition in O(out · in · r).

Source: Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024,
arXiv 2406.01775, algorithm 1.
Deviations: signs are those of LAPACK, as in the official code and PEFT. PEFT's implementation
ignores `fan_in_fan_out`; here W is always (out, in). As in the paper, the factors are not divided
by the scaling: at large s, ‖s B A‖ is far above ‖W‖. Embeddings are not supported: their leading
columns are those of the vocabulary's first r entries, which have no meaning.
"""

from __future__ import annotations

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer, workspace


@register_initializer(
    "olora",
    paper="Büyükakyüz 2024, arXiv 2406.01775",
    base="subtract",
    reads=("weight",),
    operations=("product", "convolution"),
)
@batched
@workspace(3.0, 0.0)
def olora(layer: Layer, options: Options) -> Factors:
    """B (out, rank) with orthonormal columns, A (rank, in) upper trapezoidal; float32."""
    q, r = linalg.leading_qr(layer.stored_weight, layer.rank)
    return Factors(lora_A=r, lora_B=q)
