"""OLoRA: the leading columns of W's QR decomposition.

W = Q R; B = Q[:, :r], A = R[:r]; the base becomes W - s B A. The first r columns of Q depend on the
first r columns of W alone, so Q = qr(W[:, :r]), A = Qᵀ W gives the same factors as the full
decomposition in O(out · in · r).

Source: Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024,
arXiv 2406.01775, algorithm 1.
Deviations: signs are LAPACK's, as in the official code and PEFT. PEFT's branch ignores
`fan_in_fan_out`; here W is always (out, in). The factors are not divided by the scaling (the paper
does not either): at large s, ‖s B A‖ is far above ‖W‖. Embeddings are not served: the leading
columns would be those of the vocabulary's first r entries, which mean nothing.
"""

from __future__ import annotations

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer
from lora_init.weights.module_types import LINEAR_TYPES


@register_initializer(
    "olora",
    paper="Büyükakyüz 2024, arXiv 2406.01775",
    base="subtract",
    reads=("weight",),
    modules=(*LINEAR_TYPES, "Conv2d"),
)
@batched
def olora(layer: Layer, options: Options) -> Factors:
    """B (out, rank) with orthonormal columns, A (rank, in) upper trapezoidal; float32."""
    q, r = linalg.leading_qr(layer.stored_weight, layer.rank)
    return Factors(lora_A=r, lora_B=q)
