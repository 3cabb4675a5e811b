"""RLPO or RLMO: initialize A with right singular vectors of W, and B with zero.

W = U S Vᵀ (thin, min(out, in) triplets). The rows of A are r columns of V; B = 0. The base stays,
and the singular values are not used.

- "rlpo" (principal) takes the vectors of the r largest singular values.
- "rlmo" (minor) takes those of the r smallest.

With B = 0 and orthonormal rows of A, the first steps of LoRA follow the projection of full
fine-tuning on the span of A. Any orthonormal A does this; the two methods choose its span. The
control `orthonormal` draws it at random.

Source: "Geometry-Preserving Orthonormal Initialization for Low-Rank Adaptation in RLVR", ICML 2026,
arXiv 2606.31813, section 5.2.
Deviations: the vectors are those of the official code, which takes a full SVD. This code computes
only the first or last triplets; for "rlmo" in float64, the smallest first. So the factors of rank r
are the first r of those of a higher rank. The official code stores the factors in bfloat16, which
loses the orthonormality; here they are float32. As there, the factors are not divided by the
scaling. For out < in the vectors are those of the thin SVD. The null space of W, where W Aᵀ would
be 0, is not used. PEFT does not have this method.
"""

from __future__ import annotations

from functools import partial

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer, workspace

register = partial(
    register_initializer,
    paper="ICML 2026, arXiv 2606.31813",
    reads=("weight",),
    operations=("product", "convolution", "lookup"),
)


@register("rlpo")
@batched
@workspace(3.0, 0.0)
def rlpo(layer: Layer, options: Options) -> Factors:
    """A (rank, in): the first right singular vectors, as rows; B (out, rank) zero; float32."""
    size = linalg.nesting_rank(layer.rank, min(layer.shape))
    return _from_directions(layer, linalg.top_singular(layer.stored_weight, size))


@register("rlmo")
@batched
@workspace(9.0, 0.0)
def rlmo(layer: Layer, options: Options) -> Factors:
    """A (rank, in): the last right singular vectors, the very last first; B (out, rank) zero."""
    size = linalg.nesting_rank(layer.rank, min(layer.shape))
    return _from_directions(layer, linalg.bottom_singular(layer.stored_weight, size))


def _from_directions(layer: Layer, triplets: linalg.Decomposition) -> Factors:
    lora_A = triplets.leading(layer.rank).right.mT
    return Factors(
        lora_A=lora_A,
        lora_B=lora_A.new_zeros(*layer.stack, layer.shape[0], layer.rank),
        metrics={"algorithm": triplets.method, "residual": triplets.residual},
    )
