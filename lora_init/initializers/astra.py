"""Astra: initialize the adapter with the projection of W on the main directions of its outputs.

R = XᵀX / tokens is the uncentered second moment of the layer's inputs, so W R Wᵀ is that of its
outputs without bias. With U (out × r), the eigenvectors of its r largest eigenvalues,

    B = U,    A = Uᵀ W / s,    s B A = U Uᵀ W,

and the base becomes W - s B A. Among all products of rank r, this one has the least mean of
‖(W - s B A) x‖², the sum of the other eigenvalues. The adapter trains the best rank-r copy of the
layer's outputs. It equals `qera` for a base that is quantized to zero. W R Wᵀ (out × out) is a
linear operator here; only small layers form the matrix.

Source: Liu et al., "Astra: Activation-Space Tail-Eigenvector Low-Rank Adaptation of Large Language
Models", Findings of ACL 2026, arXiv 2602.19111. By "tail" eigenvectors, the official code and PEFT
mean the last columns of an ascending decomposition, the
eigenvectors of the largest eigenvalues.
Deviations: the official code and PEFT sum the moment of the outputs with the bias. They divide the
outputs of each forward pass by |max(y)| first, and count padded positions. This code uses all
unmasked tokens with equal weight, and leaves out the bias, which needs no adapter. They do not
divide by the scaling, so they subtract the projection only at alpha = r. With fewer tokens than
inputs, R is zero in some directions. R's diagonal is raised by 1e-6 of its mean, so that the
remaining rank holds most of W there. PEFT 0.21 does not have this method; later versions do.
"""

from __future__ import annotations

import torch

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.initializers.qera import lifted, output_error
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer, workspace


@register_initializer(
    "astra",
    paper="Liu et al. 2026, arXiv 2602.19111",
    base="subtract",
    reads=("weight", "inputs"),
    operations=("product", "convolution"),
)
@batched
@workspace(3.5, 3.0)
def astra(layer: Layer, options: Options) -> Factors:
    """A (rank, in), B (out, rank) with orthonormal columns; float32; s B A = U Uᵀ W."""
    weight, moment = layer.weight, lifted(layer.inputs.second_moment)
    operator = output_error(weight, moment.to(weight.dtype), moment)
    triplets = linalg.top_singular(operator, layer.rank, generator=layer.generator)
    left = triplets.left
    energy = ((weight @ moment.to(weight.dtype)) * weight).sum((-2, -1), dtype=torch.float64)
    share = triplets.values.sum(-1) / energy.clamp_min(torch.finfo(torch.float64).tiny)
    return Factors(
        lora_A=left.mT @ weight / layer.scaling,
        lora_B=left,
        metrics={
            "algorithm": triplets.method,
            "residual": triplets.residual,
            # The share of the outputs' mean square that the adapter produces.
            "output_energy": share.clamp(0, 1),
        },
    )
