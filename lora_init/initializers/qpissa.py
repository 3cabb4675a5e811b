"""QPiSSA: the principal triplets of W are trained, the quantised rest is frozen.

Repeat T times, from Q_0 = 0:   s B A = SVD_r(W - Q_{t-1}), root split, B = U sqrt(S / s),
A = sqrt(S / s) Vᵀ;   Q_t = quant(W - s B A). The base becomes Q_T; the method ends on the quantise
step. T = 1 is PiSSA with its residual quantised: without its largest triplets W is smaller and
nearer to a gaussian, so that the same bits lose less of it. T > 1 lets the adapter take up what
quantisation loses. LoftQ is the same alternation begun and ended half a step later.

Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", NeurIPS
2024, arXiv 2404.02948, section on QPiSSA and appendix on several iterations (T = 5 there).
Deviations: the scaling is divided out, so that Q + s B A is the same at every s; the authors'
program fixes s = 1. It takes full SVDs and one iteration by default; ours computes the top r
triplets only, as `pissa` does. Quantising is no projection (the scale of a block moves with its
weights), so an iteration may raise the error: the report shows every one.

Saving and loading: the base is Q = dequantize(quantize(W - s B A)) of the very factors returned,
so they alone rebuild it from the original weight (see `lora_init.factors.Replacement`).
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
from lora_init.registry import Options, batched, register_initializer
from lora_init.weights.module_types import MODULE_TYPES


@dataclass
class QpissaOptions(Options):
    """Settings of QPiSSA; the last two are LoftQ's.

    A base that is quantised already keeps its own quantiser; `bits`, `quantizer` and
    `block_size` are not read then.

    Attributes:
        bits: 2, 4 or 8 bits a weight.
        iterations: T, alternations of SVD and quantise.
        quantizer: "normal_float" (NF2, NF4, and row-wise int8 at 8 bits) or "uniform".
        block_size: weights that share one scale.
    """

    bits: int = 4
    iterations: int = 5
    quantizer: str = "normal_float"
    block_size: int = 64

    def __post_init__(self) -> None:
        check_count("qpissa: iterations", self.iterations)
        self.quantization()  # refuses what no quantiser takes

    def quantization(self) -> Quantizer:
        return block_quantizer("qpissa", "bits", self.bits, self.quantizer, self.block_size)


@register_initializer(
    "qpissa",
    options=QpissaOptions,
    paper="Meng et al. 2024, arXiv 2404.02948",
    base="replace",
    preserves_output=False,
    reads=("weight", "quantizer"),
    modules=MODULE_TYPES,
)
@batched
def qpissa(layer: Layer, options: QpissaOptions) -> Factors:
    """A (rank, in), B (out, rank), float32, balanced, and the recipe of the quantised base."""
    weight, scaling = layer.weight, layer.scaling
    norm = linalg.frobenius_norm(weight).clamp_min(torch.finfo(weight.dtype).tiny)
    quantizer = layer_quantizer(layer, options)
    lost = weight - quantizer.roundtrip(weight)
    plain = linalg.frobenius_norm(lost) / norm
    residual, start, errors = weight, None, []
    for _ in range(options.iterations):
        triplets = linalg.top_singular(residual, layer.rank, generator=layer.generator, start=start)
        start = triplets.right  # W - Q holds the last product and noise: its subspace moves little
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
