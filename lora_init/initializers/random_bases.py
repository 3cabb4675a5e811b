"""PiSSA's singular values on random bases: its norm and its spectrum without its directions.

With S_r the r largest singular values of W, and U (out × r), V (in × r) random with orthonormal
columns (Haar-distributed),

    B = U sqrt(S_r / s), A = sqrt(S_r / s) Vᵀ; the base becomes W - s B A.

A control for `pissa`: ‖A‖, ‖B‖ and ‖s B A‖ are the same layer by layer, and so are the singular
values; U and V know nothing of W. What PiSSA gains beyond this control, its directions gain.

Source: a control of this project, for the claim (LoRAM, 2025) that the magnitude of a spectral
start explains its speed.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.factors import Factors
from lora_init.initializers.pissa import PissaOptions, pissa
from lora_init.layer import Layer
from lora_init.linalg.draws import normal
from lora_init.registry import Options, batched, register_initializer
from lora_init.weights.module_types import MODULE_TYPES


@register_initializer(
    "random_bases",
    paper="control, no paper",
    base="subtract",
    reads=("weight",),
    modules=MODULE_TYPES,
    control=True,
)
@batched
def random_bases(layer: Layer, options: Options) -> Factors:
    """A (rank, in) and B (out, rank), float32, balanced as PiSSA's: A Aᵀ = Bᵀ B = S_r / s."""
    rows, columns = layer.shape
    bases = [
        (orthonormal(rows, layer.rank, each), orthonormal(columns, layer.rank, each))
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


def orthonormal(size: int, count: int, generator: torch.Generator) -> Float[Tensor, "size count"]:
    """`count` orthonormal columns, Haar-distributed; float64 on the CPU."""
    drawn = normal(size, count, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(drawn)
    return basis * torch.sign(torch.diagonal(triangle))  # Haar, not LAPACK's choice of signs
