"""PiSSA: train the largest singular components of W, and freeze the rest.

W = U S Vᵀ; B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_rᵀ; the base becomes W - s B A. Division by
the scaling makes s B A the best rank-r approximation of W for every s.

Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", NeurIPS
2024, arXiv 2404.02948, equations 2-4; `niter` is its fast SVD (section 3, table of appendix).
Deviations: the official code and PEFT take a full SVD for "pissa". This code computes only the top
r triplets, with an excess Frobenius error of at most 1e-4. PEFT's `pissa_niter_N` draws its test
matrix from the global generator, without oversampling, so a reload gives another residual. Here the
draw is seeded per layer. `niter=N` asks for the accuracy of N subspace iterations. A Krylov space
reaches it, or better, with fewer products; method="subspace" runs exactly N iterations. Signs
follow a fixed convention.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import Options, batched, register_initializer, workspace


@dataclass
class PissaOptions(Options):
    """Settings of PiSSA.

    Attributes:
        niter: None computes accurate triplets; an integer N >= 0 gives at least the accuracy of N
            subspace iterations ("pissa_niter_N").
        method: the algorithm of `linalg.top_singular`: auto, exact, gram, gram-krylov or krylov
            if `niter` is None; else auto, powers or subspace.
    """

    niter: int | None = None
    method: str = "auto"

    def __post_init__(self) -> None:
        if self.niter is not None and (not isinstance(self.niter, int) or self.niter < 0):
            raise ValueError(
                f"pissa: niter={self.niter!r} is not supported: must be None or an integer >= 0"
            )
        supported = ("auto", *(linalg.QUALITY if self.niter is None else linalg.ITERATIONS))
        if self.method not in supported:
            raise ValueError(
                f"pissa: method={self.method!r} is not supported with niter={self.niter}: must be "
                f"one of {', '.join(supported)}"
            )

    @classmethod
    def from_name(cls, name: str) -> PissaOptions | None:
        match = re.fullmatch(r"pissa_niter_(\d+)", name)
        return None if match is None else cls(niter=int(match[1]))


@register_initializer(
    "pissa",
    options=PissaOptions,
    paper="Meng et al. 2024, arXiv 2404.02948",
    base="subtract",
    reads=("weight",),
    operations=("product", "convolution", "lookup"),
)
@batched
@workspace(3.0, 0.0)
def pissa(layer: Layer, options: PissaOptions) -> Factors:
    """A (rank, in) and B (out, rank), float32, balanced: A Aᵀ = Bᵀ B = S_r / s."""
    if options.niter is None:
        size = linalg.nesting_rank(layer.rank, min(layer.shape), smallest=linalg.LEAST_TRIPLETS)
        triplets = linalg.top_singular(layer.stored_weight, size, method=options.method)
        triplets = triplets.leading(layer.rank)
    else:
        triplets = linalg.top_singular(
            layer.stored_weight,
            layer.rank,
            method=options.method,
            niter=options.niter,
            generator=layer.generator,
        )
    root = (triplets.values / layer.scaling).sqrt()
    return Factors(
        lora_A=root[..., None] * triplets.right.mT,
        lora_B=triplets.left * root[..., None, :],
        metrics={"algorithm": triplets.method, "residual": triplets.residual},
    )
