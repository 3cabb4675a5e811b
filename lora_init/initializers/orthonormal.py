"""Initialize A with random orthonormal rows, and B with zero (a control).

The rows of A are Haar-distributed: Q of the QR decomposition of a Gaussian matrix (in × r), with
the signs of R's diagonal. A Aᵀ = I; B = 0; the base stays.

`rlpo`, `rlmo`, `eva` and `osrm` also start from an A with orthonormal rows and B = 0. An advantage
over this control comes from their directions. The rows of `kaiming` have a norm of about 1/sqrt(3).

Source: the ablation "random" in the official code of RLPO, arXiv 2606.31813 (see `rlpo`).
Deviations: none known; the official code draws from the global generator, and here each layer has
a seeded generator.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_init.factors import Factors
from lora_init.initializers.random_bases import haar_columns
from lora_init.layer import Layer
from lora_init.linalg.draws import zeros
from lora_init.registry import Options, register_initializer


@dataclass
class OrthonormalOptions(Options):
    """Settings of the control "orthonormal": none."""

    def refuse_rank(self, rank: int, shape: tuple[int, int]) -> str | None:
        limit = shape[1]
        if rank <= limit:
            return None
        return f"A has orthonormal rows of length {limit}, so r must be at most {limit}"


@register_initializer(
    "orthonormal",
    options=OrthonormalOptions,
    paper="control, no paper",
    operations=("product", "convolution", "lookup"),
    control=True,
)
def orthonormal(layer: Layer, options: OrthonormalOptions) -> Factors:
    """A (rank, in) with orthonormal rows, B (out, rank) zero; float32."""
    rows, columns = layer.shape
    basis = haar_columns(columns, layer.rank, layer.generator)
    return Factors(basis.mT.float(), zeros(rows, layer.rank))
