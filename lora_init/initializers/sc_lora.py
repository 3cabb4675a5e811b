"""SC-LoRA: adapt the output directions that new data use and data to keep do not.

C₊ and C₋ are the uncentered second moments of the layer's inputs on the calibration sets "learn"
and "keep". The outputs of W then have the second moments P = W C₊ Wᵀ and N = W C₋ Wᵀ. Q holds the
eigenvectors of the r algebraically largest eigenvalues of

    M = (1 - beta) P / tr P - beta N / tr N,

and

    B = Q,    A = Qᵀ W / s,    s B A = Q Qᵀ W,

and the base becomes W - s B A. With `bias=True`, P and N are second moments of W x + b, with the
layer's bias b: P = W C₊ Wᵀ + W μ bᵀ + b μᵀ Wᵀ + b bᵀ, where μ is the mean input. Q then lies in
the space of W's columns and b. At beta = 0, s B A is the best rank-r copy of the outputs on
"learn". A larger beta moves the adapter away from what "keep" uses. M is indefinite. A direction
with a negative eigenvalue costs more on "keep" than it gives on "learn". The report counts the
positive eigenvalues, and a warning names layers with fewer of them than r.

Source: Luo et al., "SC-LoRA: Balancing Efficient Fine-tuning and Knowledge Preservation via
Subspace-Constrained LoRA", 2025, arXiv 2505.23724.
Deviations: the official code divides the outputs of each sample by |max y| and sums over samples.
That weight cannot be computed from C, so this code makes the sets comparable by their traces;
`normalize="none"` uses the moments as they are. The official code includes the bias in the outputs.
This code does so only with `bias=True`, because a constant output needs no adapter. The official
code has no scaling; this code divides A by s. For out > in, Q lies in the column space of W, where
s B A can act. The authors use beta = 0.8 to keep world knowledge, 0.9 to keep safety and 0.5 for
poisoned data. PEFT does not have this method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.linalg.moments import InputSets
from lora_init.registry import (
    CalibrationRequest,
    Options,
    Reads,
    batched,
    register_initializer,
    workspace,
)

LEARN, KEEP = "learn", "keep"
# Second moments are float32 sums. Smaller eigenvalues, relative to the largest, are their rounding.
ROUNDING = 1e-6


@dataclass
class ScLoraOptions(Options):
    """Settings of SC-LoRA.

    Attributes:
        beta: weight of the set "keep", between 0 and 1.
        normalize: "trace" divides the second moment of each set by its trace, "none" does not.
        bias: whether the outputs include the bias, as in the official code.
    """

    beta: float = 0.5
    normalize: str = "trace"
    bias: bool = False

    def __post_init__(self) -> None:
        number = isinstance(self.beta, int | float) and not isinstance(self.beta, bool)
        if not number or not 0.0 <= self.beta <= 1.0:
            raise ValueError(
                f"sc_lora: beta={self.beta!r} is not supported: must be a number from 0 to 1. Use "
                "0.5 to weigh both sets equally"
            )
        if self.normalize not in ("trace", "none"):
            raise ValueError(
                f"sc_lora: normalize={self.normalize!r} is not supported: must be one of trace, "
                "none. Use 'trace' for sets of different sizes"
            )

        if not isinstance(self.bias, bool):
            raise ValueError(f"sc_lora: bias={self.bias!r} is not supported: must be True or False")

    def also_reads(self) -> frozenset[Reads]:
        return frozenset({"bias"} if self.bias else ())

    def input_request(self) -> CalibrationRequest:
        return CalibrationRequest(sets=(LEARN, KEEP))

    def concern(self, metrics: Mapping[str, Any], rank: int) -> str | None:
        if metrics["positive_eigenvalues"] >= rank:
            return None
        return (
            "fewer directions than the rank serve 'learn' more than 'keep'; lower beta or r, or "
            "pass other batches"
        )


@register_initializer(
    "sc_lora",
    options=ScLoraOptions,
    paper="Luo et al. 2025, arXiv 2505.23724",
    base="subtract",
    reads=("weight", "inputs"),
    operations=("product", "convolution"),
)
@batched
@workspace(13.0, 2.5)
def sc_lora(layer: Layer, options: ScLoraOptions) -> Factors:
    """A (rank, in) and B (out, rank) with orthonormal columns, float32; s B A = Q Qᵀ W."""
    weight = layer.weight.double()
    basis, columns = None, weight
    if options.bias:
        assert layer.bias is not None
        columns = torch.cat([weight, layer.bias.double()[..., None]], dim=-1)
    if layer.shape[0] > layer.shape[1]:
        basis, columns = linalg.thin_qr(columns)
    reduced, bias = columns.split([layer.shape[1], columns.shape[-1] - layer.shape[1]], dim=-1)
    inputs = layer.inputs
    assert isinstance(inputs, InputSets)
    learn, keep = (_outputs(reduced, bias, inputs[name]) for name in (LEARN, KEEP))
    if options.normalize == "trace":
        learn, keep = (one / _trace(one).clamp_min(torch.finfo().tiny) for one in (learn, keep))
    size = linalg.nesting_rank(layer.rank, min(layer.shape))
    # Shifted by at least the size of the smallest eigenvalue: the solver is for semi-definite ones.
    shift = options.beta * _trace(keep)
    matrix = (1 - options.beta) * learn - options.beta * keep
    matrix.diagonal(dim1=-2, dim2=-1).add_(shift[..., 0])
    values, vectors = linalg.top_eigen(matrix, size, method="exact")
    values = values[..., : layer.rank] - shift[..., 0]
    vectors = vectors[..., : layer.rank]
    noise = ROUNDING * ((1 - options.beta) * _trace(learn) + shift)[..., 0]
    left = vectors if basis is None else basis @ vectors
    return Factors(
        lora_A=(vectors.mT @ reduced if basis is None else left.mT @ weight).float()
        / layer.scaling,
        lora_B=left.float(),
        metrics={
            "positive_eigenvalues": (values > noise).sum(-1),
            "learn_energy": _share(vectors, learn),
            "keep_energy": _share(vectors, keep),
        },
    )


def _outputs(
    weight: Float[Tensor, "*stack out in"], bias: Float[Tensor, "*stack out one"], inputs: Any
) -> Float[Tensor, "*stack out out"]:
    """The second moment of W x, or of W x + b; `bias` has no columns or one."""
    found = weight @ inputs.second_moment @ weight.mT
    if bias.shape[-1]:
        mixed = weight @ inputs.mean[..., None].to(weight) @ bias.mT
        found = found + mixed + mixed.mT + bias @ bias.mT
    return found


def _trace(matrix: Float[Tensor, "*stack out out"]) -> Float[Tensor, "*stack 1 1"]:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _share(
    directions: Float[Tensor, "*stack out rank"], moment: Float[Tensor, "*stack out out"]
) -> Float[Tensor, "*stack"]:
    """The share of a second moment that lies in the directions."""
    inside = (directions * (moment @ directions)).sum((-2, -1))
    return inside / _trace(moment)[..., 0, 0].clamp_min(torch.finfo().tiny)
