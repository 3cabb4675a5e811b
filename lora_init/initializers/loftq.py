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
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_init import linalg
from lora_init.factors import Factors, Replacement
from lora_init.layer import Layer
from lora_init.linalg.transfer import named_on_host
from lora_init.quantization import Quantizer
from lora_init.registry import Options, batched, register_initializer
from lora_init.weights.module_types import MODULE_TYPES

NORMAL_FLOAT = {2: "nf2", 4: "nf4", 8: "int8"}


@dataclass
class LoftqOptions(Options):
    """Settings of LoftQ; the first two are PEFT's.

    A base that is quantised already keeps its own quantiser; `loftq_bits`, `quantizer` and
    `block_size` are not read then.

    Attributes:
        loftq_bits: 2, 4 or 8 bits a weight.
        loftq_iter: T, alternations of quantise and SVD.
        quantizer: "normal_float" (NF2, NF4, and row-wise int8 at 8 bits) or "uniform".
        block_size: weights that share one scale.
    """

    loftq_bits: int = 4
    loftq_iter: int = 5
    quantizer: str = "normal_float"
    block_size: int = 64

    def __post_init__(self) -> None:
        check_count("loftq: loftq_iter", self.loftq_iter)
        self.quantization()  # refuses what no quantiser takes

    def quantization(self) -> Quantizer:
        return block_quantizer(
            "loftq", "loftq_bits", self.loftq_bits, self.quantizer, self.block_size
        )


class QuantizingOptions(Protocol):
    """Options that describe a quantizer."""

    def quantization(self) -> Quantizer: ...


def block_quantizer(
    method: str, bits_option: str, bits: int, family: str, block_size: int
) -> Quantizer:
    """The quantiser that the options of LoftQ, or of a method of its kin, describe.

    Args:
        method: its name, for messages.
        bits_option: what the method calls `bits`, for messages.
        family: the option `quantizer`, "normal_float" or "uniform".

    Raises:
        ValueError: an option is not allowed.
    """
    if family not in ("normal_float", "uniform"):
        raise ValueError(
            f"{method}: quantizer={family!r}; allowed are 'normal_float' and 'uniform'"
        )
    if not isinstance(bits, int) or bits not in NORMAL_FLOAT:
        raise ValueError(f"{method}: {bits_option}={bits!r}; allowed are 2, 4 and 8")
    kind = NORMAL_FLOAT[bits] if family == "normal_float" else family
    return Quantizer(kind=kind, bits=bits, block_size=block_size)


def check_count(setting: str, count: int) -> None:
    """Refuse a number of iterations that is not an integer of at least 1.

    Raises:
        ValueError: by the setting's name.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{setting}={count!r}; allowed are integers >= 1")


def layer_quantizer(layer: Layer, options: QuantizingOptions) -> Quantizer:
    """The layer's own quantiser if its base is quantised already, else the options'.

    Values on another grid than the one the base is stored on could not be put back into it.
    """
    return options.quantization() if layer.quantizer is None else layer.quantizer


@register_initializer(
    "loftq",
    options=LoftqOptions,
    paper="Li et al. 2023, arXiv 2310.08659",
    base="replace",
    preserves_output=False,
    reads=("weight", "quantizer"),
    modules=MODULE_TYPES,
)
@batched
def loftq(layer: Layer, options: LoftqOptions) -> Factors:
    """A (rank, in), B (out, rank), float32, and the recipe of the quantised base."""
    weight, scaling = layer.weight, layer.scaling
    rows, columns = layer.shape
    norm = linalg.frobenius_norm(weight).clamp_min(torch.finfo(weight.dtype).tiny)
    quantizer = layer_quantizer(layer, options)
    lora_A = weight.new_zeros(*layer.stack, layer.rank, columns)
    lora_B = weight.new_zeros(*layer.stack, rows, layer.rank)
    start, errors, plain = None, [], None
    for _ in range(options.loftq_iter):
        replacement = Replacement(quantizer, lora_A, lora_B)
        base = replacement.base(weight, scaling)
        residual = torch.sub(weight, base, out=base)
        before = linalg.frobenius_norm(residual)
        if plain is None:
            plain = before / norm
        # The noise of a quantiser has a flat spectrum: the last iteration's subspace is the best
        # guess there is, and the objective, not the subspace, decides when to stop.
        triplets = linalg.top_singular(residual, layer.rank, generator=layer.generator, start=start)
        start = triplets.right
        root = (triplets.values / scaling).sqrt()
        lora_A, lora_B = root[..., None] * triplets.right.mT, triplets.left * root[..., None, :]
        # U S Vᵀ is a projection of the residual: what is left needs no third matrix.
        left = before.square() - triplets.values.double().square().sum(-1)
        errors.append(left.clamp_min(0).sqrt() / norm)
    return Factors(
        lora_A,
        lora_B,
        replacement=replacement,
        metrics=error_figures(errors, plain)
        | {"quantizer": quantizer.name, "algorithm": triplets.method},
    )


def error_figures(errors: list[Tensor], plain: Tensor) -> dict[str, Any]:
    """A method's relative errors, after each iteration and without an adapter.

    Numbers for one layer, read in one copy; tensors for a stack.
    """
    figures = {
        "error": errors[-1],
        "error_by_iteration": torch.stack(errors, dim=-1),
        "error_without_adapter": plain,
    }
    return figures if plain.ndim else named_on_host(**figures)
