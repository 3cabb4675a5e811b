"""QERA: the adapter that leaves a quantised layer the least output error.

Q = quant(W), E = W - Q, R = XᵀX / tokens, the uncentred second moment of the layer's inputs. Over
all products of rank r, the mean of ‖(E - s B A) x‖², tr((E - s B A) R (E - s B A)ᵀ), is least at

    B = U,    A = Uᵀ E / s,    U = the r leading eigenvectors of E R Eᵀ,    s B A = U Uᵀ E,

where it is the sum of the other eigenvalues. The base becomes Q, quantised plainly, and there is
nothing to iterate. It is the least error for this Q: LoftQ and QPiSSA choose another one, and where
the inputs are hardly correlated QPiSSA can end below it (MiniLM, real sentences, NF4, r = 32, as a
share of plain quantisation's mean square: query 0.37 against QPiSSA's 0.31, intermediate 0.26
against 0.52, output 0.31 against 0.49).

The paper writes it as R^(-1/2) SVD_r(R^(1/2) E) (weights there are (in, out)). The left vectors of
E R^(1/2) are the eigenvectors of E R Eᵀ, and Uᵀ E R^(1/2) R^(-1/2) is Uᵀ E: neither a square root
nor an inverse is needed. E R Eᵀ (out × out) is known by its products and, but for small layers,
never formed.

Source: Zhang, Wong, Xiao, Constantinides & Zhao, "QERA: an Analytical Framework for Quantization
Error Reconstruction", ICLR 2025, arXiv 2410.06040, theorem 1 (QERA-exact).
Deviations: the paper splits into B = U S, A = S⁻¹ Uᵀ E, with S the singular values of E R^(1/2);
ours has nothing to divide by, and divides s out. Where there are fewer tokens than inputs, R knows
nothing of some directions; lifted by 1e-6 of its mean diagonal, it leaves what remains of r to the
weight's own error there. QERA-approx (a diagonal R) is not served. Not in PEFT.

Saving and loading: the base is quant(W) itself, rebuilt from the original weight (see
`lora_init.factors.Replacement`); its factors are zero.
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
from lora_init.registry import Options, batched, register_initializer
from lora_init.weights.module_types import LINEAR_TYPES


@dataclass
class QeraOptions(Options):
    """Settings of QERA; names and meaning are QPiSSA's.

    A base that is quantised already keeps its own quantiser; no option is read then.

    Attributes:
        bits: 2, 4 or 8 bits a weight.
        quantizer: "normal_float" (NF2, NF4, and row-wise int8 at 8 bits) or "uniform".
        block_size: weights that share one scale.
    """

    bits: int = 4
    quantizer: str = "normal_float"
    block_size: int = 64

    def __post_init__(self) -> None:
        self.quantization()  # refuses what no quantiser takes

    def quantization(self) -> Quantizer:
        return block_quantizer("qera", "bits", self.bits, self.quantizer, self.block_size)


@register_initializer(
    "qera",
    options=QeraOptions,
    paper="Zhang et al. 2024, arXiv 2410.06040",
    base="replace",
    preserves_output=False,
    reads=("weight", "inputs", "quantizer"),
    modules=(*LINEAR_TYPES, "Conv2d"),
)
@batched
def qera(layer: Layer, options: QeraOptions) -> Factors:
    """A (rank, in), B (out, rank) with orthonormal columns, float32, and plain quantisation."""
    weight, (rows, columns) = layer.weight, layer.shape
    quantizer = layer_quantizer(layer, options)
    error = weight - quantizer.roundtrip(weight)
    moment = layer.inputs.second_moment
    # Unseen directions hold rounding; lifted, they are told apart by the weight's error instead.
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(NULL_SPACE_LIFT * diagonal.mean(-1, keepdim=True))
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
        # Of plain quantisation's root mean square output error, the share that is left.
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


def output_error(
    error: Float[Tensor, "*stack out in"],
    moment: Float[Tensor, "*stack in in"],
    exact: Float[Tensor, "*stack in in"] | None = None,
) -> linalg.Operator:
    """``x -> E R Eᵀ x``, a symmetric map of the outputs, by its products.

    Args:
        exact: R in float64, for the same map in float64; None where `moment` is exact.
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
