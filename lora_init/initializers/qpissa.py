"""QPiSSA: train the largest singular components of W, and quantize and freeze the rest.

Start from Q_0 = 0 and repeat T times:

    U S Vᵀ = SVD_r(W - Q_{t-1}),    B = U sqrt(S / s),    A = sqrt(S / s) Vᵀ,
    Q_t = quant(W - s B A).

The base becomes Q_T. T = 1 is PiSSA with a quantized residual. Without its largest triplets W is
smaller and closer to Gaussian, so the same bits lose less of it. With T > 1 the adapter also
corrects the quantization error. LoftQ is the same alternation, shifted by half a step.

Saving and loading: the base is Q = dequantize(quantize(W - s B A)) with the returned factors. They
are enough to rebuild it from the original weight (see `lora_init.factors.Replacement`).

Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", NeurIPS
2024, arXiv 2404.02948, section on QPiSSA and appendix on several iterations (T = 5 there).
Deviations: the factors are divided by the scaling, so that Q + s B A is the same at every s; the
authors' program fixes s = 1. It takes full SVDs, and one iteration by default. This code computes
only the top r triplets, as `pissa` does. Quantization is not a projection (the scale of a block
moves with its weights), so an iteration may increase the error. The report shows every iteration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_init import linalg
from lora_init.factors import Factors, Replacement
from lora_init.initializers.loftq import (
    block_quantizer,
    check_count,
    error_figures,
    layer_quantizer,
)
from lora_init.layer import Layer
from lora_init.quantization import Quantizer
from lora_init.registry import Options, batched, register_initializer, workspace


@dataclass
class QpissaOptions(Options):
    """Settings of QPiSSA; `quantizer` and `block_size` are those of LoftQ.

    A base that is quantized already keeps its own quantizer. `bits`, `quantizer` and `block_size`
    then have no effect.

    Attributes:
        bits: bits per weight: 2, 4 or 8.
        iterations: T, the number of iterations.
        quantizer: "normal_float" (NF2, NF4, and row-wise int8 at 8 bits) or "uniform".
        block_size: how many weights share one scale.
    """

    bits: int = 4
    iterations: int = 5
    quantizer: str = "normal_float"
    block_size: int = 64

    def __post_init__(self) -> None:
        check_count("qpissa: iterations", self.iterations)
        self.quantization()  # raises for unsupported values

    def quantization(self) -> Quantizer:
        return block_quantizer("qpissa", "bits", self.bits, self.quantizer, self.block_size)


@register_initializer(
    "qpissa",
    options=QpissaOptions,
    paper="Meng et al. 2024, arXiv 2404.02948",
    base="replace",
    preserves_output=False,
    reads=("weight", "quantizer"),
    operations=("product", "convolution", "lookup"),
)
@batched
@workspace(8.0, 0.0)
def qpissa(layer: Layer, options: QpissaOptions) -> Factors:
    """A (rank, in), B (out, rank), float32, balanced, and the recipe of the quantized base."""
    weight, scaling = layer.weight, layer.scaling
    norm = linalg.frobenius_norm(weight).clamp_min(torch.finfo(weight.dtype).tiny)
    quantizer = layer_quantizer(layer, options)
    lost = weight - quantizer.roundtrip(weight)
    plain = linalg.frobenius_norm(lost) / norm
    residual, start, errors = weight, None, []
    for _ in range(options.iterations):
        triplets = linalg.top_singular(residual, layer.rank, generator=layer.generator, start=start)
        start = triplets.right  # the subspace of W - Q moves little between iterations
        root = (triplets.values / scaling).sqrt()
        replacement = Replacement(
            quantizer,
            lora_A=root[..., None] * triplets.right.mT,
            lora_B=triplets.left * root[..., None, :],
        )
        base = replacement.base(weight, scaling)
        residual = torch.sub(weight, base, out=base)
        product = (triplets.left * triplets.values[..., None, :]) @ triplets.right.mT
        errors.append(linalg.frobenius_norm(torch.sub(residual, product, out=product)) / norm)
    return Factors(
        replacement.lora_A,
        replacement.lora_B,
        replacement=replacement,
        metrics=error_figures(errors, plain)
        | {"quantizer": quantizer.name, "algorithm": triplets.method},
    )
