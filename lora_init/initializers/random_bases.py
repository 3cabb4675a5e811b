"""Combine PiSSA's singular values with random singular vectors (a control).

S_r holds the r largest singular values of W. U (out × r) and V (in × r) are random with orthonormal
columns (Haar-distributed). Then

    B = U sqrt(S_r / s), A = sqrt(S_r / s) Vᵀ; the base becomes W - s B A.

In every layer, `pissa` and this method have the same ‖A‖, ‖B‖, ‖s B A‖ and singular values, but
here U and V do not depend on W. An advantage of PiSSA over this control comes from its directions.

Source: a control of this project. It tests the claim (LoRAM, 2025) that the magnitude of a spectral
initialization explains its speed.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.factors import Factors
from lora_init.initializers.pissa import PissaOptions, pissa
from lora_init.layer import Layer
from lora_init.linalg.draws import normal
from lora_init.registry import Options, batched, register_initializer, workspace


@register_initializer(
    "random_bases",
    paper="control, no paper",
    base="subtract",
    reads=("weight",),
    operations=("product", "convolution", "lookup"),
    control=True,
)
@batched
@workspace(3.0, 0.0)
def random_bases(layer: Layer, options: Options) -> Factors:
    """A (rank, in) and B (out, rank), float32, balanced like PiSSA's: A Aᵀ = Bᵀ B = S_r / s."""
    rows, columns = layer.shape
    bases = [
        (haar_columns(rows, layer.rank, each), haar_columns(columns, layer.rank, each))
        for each in layer.generators
    ]
    left, right = (torch.stack(part) for part in zip(*bases, strict=True))
    if not layer.is_stack:
        left, right = left[0], right[0]
    principal = pissa(layer, PissaOptions())
    root = torch.linalg.vector_norm(principal.lora_A, dim=-1, dtype=torch.float64)
    lora_A = root[..., None] * right.mT.to(root.device)
    lora_B = left.to(root.device) * root[..., None, :]
    return Factors(lora_A.float(), lora_B.float())


def haar_columns(size: int, count: int, generator: torch.Generator) -> Float[Tensor, "size count"]:
    """`count` orthonormal columns, Haar-distributed; float64 on the CPU."""
    drawn = normal(size, count, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(drawn)
    return basis * torch.sign(torch.diagonal(triangle))  # Haar, whatever LAPACK's signs
