"""LoftQ: a quantised base and the adapter that best makes up for the quantisation error.

Repeat T times, from s B A = 0:   Q = quant(W - s B A);   s B A = SVD_r(W - Q), root split,
B = U sqrt(S / s), A = sqrt(S / s) Vᵀ. The base becomes Q; the method ends on the SVD step. The
scaling is divided out, so that s B A, which is what the layer adds, corrects the error at any s.

Source: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR
2024, arXiv 2310.08659, algorithm 1.
Deviations: PEFT solves for B A and ignores the scaling: at s = 2 its correction helps nothing, at
s = 16 it is nine times worse than none. T = 5 is the paper's default, PEFT's is 1. The weight's
error falls with T; the layer's output error need not, so the report shows every iteration.

Saving and loading: the base is Q = dequantize(quantize(W - s B' A')) where B', A' are the factors
of the last but one SVD step (zero for T = 1). The quantiser is a deterministic map and the product
is rounded from float64, so storing A', B' is enough to rebuild Q from the original weight to the
bit; a checksum stored beside them is compared when an adapter is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_init import linalg
from lora_init.factors import Factors, Replacement
from lora_init.quantization import Quantizer
from lora_init.registry import register_initializer

KINDS = {("normal_float", 2): "nf2", ("normal_float", 4): "nf4", ("normal_float", 8): "int8"} | {
    ("uniform", bits): "uniform" for bits in (2, 4, 8)
}


@dataclass
class LoftqOptions:
    """Settings of LoftQ; the first two are PEFT's.

    Attributes:
        loftq_bits: 2, 4 or 8 bits a weight.
        loftq_iter: T, alternations of quantise and SVD.
        quantizer: "normal_float" (NF2, NF4, and row-wise int8 at 8 bits) or "uniform".
        block_size: weights that share one scale.
        keep_original: keep a copy of W in CPU memory, so that disable_adapter and unload work.
    """

    loftq_bits: int = 4
    loftq_iter: int = 5
    quantizer: str = "normal_float"
    block_size: int = 64
    keep_original: bool = False

    def __post_init__(self) -> None:
        if self.quantizer not in ("normal_float", "uniform"):
            raise ValueError(
                f"loftq: quantizer={self.quantizer!r}; allowed are 'normal_float' and 'uniform'"
            )
        if (self.quantizer, self.loftq_bits) not in KINDS:
            raise ValueError(f"loftq: loftq_bits={self.loftq_bits!r}; allowed are 2, 4 and 8")
        count = isinstance(self.loftq_iter, int) and not isinstance(self.loftq_iter, bool)
        if not count or self.loftq_iter < 1:
            raise ValueError(f"loftq: loftq_iter={self.loftq_iter!r}; allowed are integers >= 1")
        self.quantization()  # refuses a block size that the quantiser does not take

    def quantization(self) -> Quantizer:
        kind = KINDS[self.quantizer, self.loftq_bits]
        return Quantizer(kind=kind, bits=self.loftq_bits, block_size=self.block_size)


@register_initializer(
    "loftq",
    options=LoftqOptions,
    paper="Li et al. 2023, arXiv 2310.08659",
    base="replace",
    preserves_output=False,
    needs=("weights", "quantizer"),
)
def loftq(weight, rank, scaling, statistics, options, generator) -> Factors:
    """A (rank, in), B (out, rank), float32, and the recipe of the quantised base."""
    rows, columns = weight.shape
    norm = torch.linalg.matrix_norm(weight).clamp_min(torch.finfo(weight.dtype).tiny)
    quantizer = options.quantization()
    lora_A, lora_B = weight.new_zeros(rank, columns), weight.new_zeros(rows, rank)
    start, errors, plain = None, [], None
    for _ in range(options.loftq_iter):
        replacement = Replacement(quantizer, lora_A, lora_B)
        residual = weight - replacement.base(weight, scaling)
        if plain is None:
            plain = float(torch.linalg.matrix_norm(residual) / norm)
        # The noise of a quantiser has a flat spectrum: the last iteration's subspace is the best
        # guess there is, and the objective, not the subspace, decides when to stop.
        triplets = linalg.top_singular(residual, rank, generator=generator, start=start)
        start = triplets.right
        root = (triplets.values / scaling).sqrt()
        lora_A, lora_B = root[:, None] * triplets.right.T, triplets.left * root
        corrected = residual - (triplets.left * triplets.values) @ triplets.right.T
        errors.append(float(torch.linalg.matrix_norm(corrected) / norm))
    return Factors(
        lora_A,
        lora_B,
        replacement=replacement,
        metrics={
            "error": errors[-1],
            "error_by_iteration": errors,
            "error_without_adapter": plain,
            "quantizer": quantizer.name,
            "algorithm": triplets.method,
        },
    )
