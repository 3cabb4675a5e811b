"""QERA: quantize the base, and initialize the adapter to minimize the layer's output error.

Q = quant(W), E = W - Q, and R = XᵀX / tokens is the uncentered second moment of the layer's inputs.
Among all products of rank r, the mean of ‖(E - s B A) x‖², tr((E - s B A) R (E - s B A)ᵀ), is
smallest at

    B = U,    A = Uᵀ E / s,    U = the r leading eigenvectors of E R Eᵀ,    s B A = U Uᵀ E,

where it equals the sum of the other eigenvalues. The base becomes Q; no iteration is needed. The
error is minimal for this Q only: LoftQ and QPiSSA choose a different one. QPiSSA can have a smaller
error where the inputs are hardly correlated.

The paper writes the solution as R^(-1/2) SVD_r(R^(1/2) E), with weights (in, out). The left vectors
of E R^(1/2) are the eigenvectors of E R Eᵀ, and Uᵀ E R^(1/2) R^(-1/2) = Uᵀ E. So neither a square
root nor an inverse is needed. E R Eᵀ (out × out) is a linear operator here; only small layers form
the matrix.

Saving and loading: the base is quant(W), rebuilt from the original weight with zero factors (see
`lora_init.factors.Replacement`).

Source: Zhang, Wong, Xiao, Constantinides & Zhao, "QERA: an Analytical Framework for Quantization
Error Reconstruction", ICLR 2025, arXiv 2410.06040, theorem 1 (QERA-exact).
Deviations: the paper splits into B = U S, A = S⁻¹ Uᵀ E, where S holds the singular values of
E R^(1/2). This code does not divide by S, but divides by s. With fewer tokens than inputs, R is
zero in some directions. R's diagonal is raised by 1e-6 of its mean, so that the remaining rank
reduces the weight's error there. QERA-approx (a diagonal R) is not supported. PEFT does not have
this method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import linalg
from lora_init.factors import Factors, Replacement
from lora_init.initializers.corda import NULL_SPACE_LIFT
from lora_init.initializers.loftq import block_quantizer, layer_quantizer
from lora_init.layer import Layer
from lora_init.linalg.transfer import named_on_host
from lora_init.quantization import Quantizer
from lora_init.registry import Options, batched, register_initializer, workspace


@dataclass
class QeraOptions(Options):
    """Settings of QERA, with the names of QPiSSA's.

    A base that is quantized already keeps its own quantizer; the options then have no effect.

    Attributes:
        bits: bits per weight: 2, 4 or 8.
        quantizer: "normal_float" (NF2, NF4, and row-wise int8 at 8 bits) or "uniform".
        block_size: how many weights share one scale.
    """

    bits: int = 4
    quantizer: str = "normal_float"
    block_size: int = 64

    def __post_init__(self) -> None:
        self.quantization()  # raises for unsupported values

    def quantization(self) -> Quantizer:
        return block_quantizer("qera", "bits", self.bits, self.quantizer, self.block_size)


@register_initializer(
    "qera",
    options=QeraOptions,
    paper="Zhang et al. 2024, arXiv 2410.06040",
    base="replace",
    preserves_output=False,
    reads=("weight", "inputs", "quantizer"),
    operations=("product", "convolution"),
)
@batched
@workspace(5.0, 3.0)
def qera(layer: Layer, options: QeraOptions) -> Factors:
    """A (rank, in), B (out, rank) with orthonormal columns, float32, and the recipe of Q."""
    weight, (rows, columns) = layer.weight, layer.shape
    quantizer = layer_quantizer(layer, options)
    error = weight - quantizer.roundtrip(weight)
    # R is only rounding in unused directions; raised, it ranks them by the weight's error.
    moment = lifted(layer.inputs.second_moment)
    rounded = moment.to(error.dtype)
    operator = output_error(error, rounded, moment)
    triplets = linalg.top_singular(operator, layer.rank, generator=layer.generator)
    projected = triplets.left.mT @ error
    norm = linalg.frobenius_norm(weight).clamp_min(torch.finfo().tiny)
    plain = linalg.frobenius_norm(error)
    left = (plain.square() - projected.double().square().sum((-2, -1))).clamp_min(0).sqrt()
    outputs = ((error @ rounded) * error).sum((-2, -1), dtype=torch.float64)
    outputs = outputs.clamp_min(torch.finfo().tiny)
    figures = {
        "error": left / norm,
        "error_without_adapter": plain / norm,
        # RMS output error with the adapter, relative to that without it.
        "output_error_share": (1 - triplets.values.sum(-1) / outputs).clamp_min(0).sqrt(),
    }
    return Factors(
        lora_A=projected / layer.scaling,
        lora_B=triplets.left,
        replacement=Replacement(
            quantizer,
            weight.new_zeros(*layer.stack, layer.rank, columns),
            weight.new_zeros(*layer.stack, rows, layer.rank),
        ),
        metrics=(figures if layer.is_stack else named_on_host(**figures))
        | {"quantizer": quantizer.name, "algorithm": triplets.method},
    )


def lifted(moment: Float[Tensor, "*stack in in"]) -> Float[Tensor, "*stack in in"]:
    """Raise the diagonal of R by `NULL_SPACE_LIFT` of its mean, in place."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(NULL_SPACE_LIFT * diagonal.mean(-1, keepdim=True))
    return moment


def output_error(
    error: Float[Tensor, "*stack out in"],
    moment: Float[Tensor, "*stack in in"],
    exact: Float[Tensor, "*stack in in"] | None = None,
) -> linalg.Operator:
    """The symmetric linear operator ``x -> E R Eᵀ x``.

    Args:
        error: E.
        moment: R in the dtype of E.
        exact: R in float64, for the operator's float64 form; None where `moment` is exact.
    """
    dense = linalg.Operator.dense(error)
    *stack, rows, _ = error.shape

    def multiply(block: Float[Tensor, "*stack out k"]) -> Float[Tensor, "*stack out k"]:
        return dense.matmul(moment @ dense.rmatmul(block))

    def members() -> list[linalg.Operator]:
        wide = [None] * len(error) if exact is None else exact
        return [output_error(*each) for each in zip(error, moment, wide, strict=True)]

    upcast = None if exact is None else lambda: output_error(error.double(), exact)
    return linalg.Operator(
        shape=(*stack, rows, rows),
        matmul=multiply,
        rmatmul=multiply,
        dtype=error.dtype,
        device=error.device,
        upcast=upcast,
        members=members if stack else None,
    )
