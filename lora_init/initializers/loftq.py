"""LoftQ: quantize the base, and initialize the adapter to correct the quantization error.

Start from s B A = 0 and repeat T times:

    Q = quant(W - s B A),    U S Vᵀ = SVD_r(W - Q),    B = U sqrt(S / s),    A = sqrt(S / s) Vᵀ.

The base becomes Q. The factors are divided by the scaling, so that s B A, which the layer adds,
corrects the error at any s.

Saving and loading: the base is Q = dequantize(quantize(W - s B' A')), where B', A' are the factors
of the SVD step before the last (zero for T = 1). The quantizer is deterministic, and the product is
rounded from float64. So A' and B' are enough to rebuild Q from the original weight exactly. A
checksum in the file is compared when an adapter is loaded.

Source: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR
2024, arXiv 2310.08659, algorithm 1.
Deviations: PEFT solves for B A and ignores the scaling, so that its correction is wrong unless
s = 1. T = 5 is the default of the paper; that of PEFT is 1. The weight's error falls with T, but
the layer's output error may not. The report shows every iteration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lora_init import linalg
from lora_init.factors import Factors, Replacement
from lora_init.layer import Layer
from lora_init.linalg.transfer import named_on_host
from lora_init.quantization import Quantizer
from lora_init.registry import Options, batched, register_initializer, workspace

NORMAL_FLOAT = {2: "nf2", 4: "nf4", 8: "int8"}


@dataclass
class LoftqOptions(Options):
    """Settings of LoftQ; the first two are PEFT's.

    A base that is quantized already keeps its own quantizer. `loftq_bits`, `quantizer` and
    `block_size` then have no effect.

    Attributes:
        loftq_bits: bits per weight: 2, 4 or 8.
        loftq_iter: T, the number of iterations.
        quantizer: "normal_float" (NF2, NF4, and row-wise int8 at 8 bits) or "uniform".
        block_size: how many weights share one scale.
    """

    loftq_bits: int = 4
    loftq_iter: int = 5
    quantizer: str = "normal_float"
    block_size: int = 64

    def __post_init__(self) -> None:
        check_count("loftq: loftq_iter", self.loftq_iter)
        self.quantization()  # raises for unsupported values

    def quantization(self) -> Quantizer:
        return block_quantizer(
            "loftq", "loftq_bits", self.loftq_bits, self.quantizer, self.block_size
        )


@runtime_checkable
class QuantizingOptions(Protocol):
    """Options that describe a quantizer."""

    def quantization(self) -> Quantizer: ...


def block_quantizer(
    method: str, bits_option: str, bits: int, family: str, block_size: int
) -> Quantizer:
    """The quantizer that a method's options describe.

    Args:
        method: the method's name, for messages.
        bits_option: the method's name for `bits`, for messages.
        bits: bits per weight: 2, 4 or 8.
        family: the option `quantizer`, "normal_float" or "uniform".
        block_size: how many weights share one scale.

    Raises:
        ValueError: an option has an unsupported value.
    """
    if family not in ("normal_float", "uniform"):
        raise ValueError(
            f"{method}: quantizer={family!r} is not supported: must be 'normal_float' or 'uniform'"
        )
    if not isinstance(bits, int) or bits not in NORMAL_FLOAT:
        raise ValueError(f"{method}: {bits_option}={bits!r} is not supported: must be 2, 4 or 8")
    kind = NORMAL_FLOAT[bits] if family == "normal_float" else family
    return Quantizer(kind=kind, bits=bits, block_size=block_size)


def check_count(setting: str, count: int) -> None:
    """Raise ValueError unless `count` is an integer >= 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{setting}={count!r} is not supported: must be an integer >= 1")


def layer_quantizer(layer: Layer, options: QuantizingOptions) -> Quantizer:
    """The quantizer of the layer's base if it is quantized already, else that of the options.

    A quantized module can only store values that its own quantizer produces.
    """
    return options.quantization() if layer.quantizer is None else layer.quantizer


@register_initializer(
    "loftq",
    options=LoftqOptions,
    paper="Li et al. 2023, arXiv 2310.08659",
    base="replace",
    preserves_output=False,
    reads=("weight", "quantizer"),
    operations=("product", "convolution", "lookup"),
)
@batched
@workspace(6.5, 0.0)
def loftq(layer: Layer, options: LoftqOptions) -> Factors:
    """A (rank, in), B (out, rank), float32, and the recipe of the quantized base."""
    weight, scaling = layer.weight, layer.scaling
    rows, columns = layer.shape
    norm = linalg.frobenius_norm(weight).clamp_min(torch.finfo(weight.dtype).tiny)
    quantizer = layer_quantizer(layer, options)
    lora_A = weight.new_zeros(*layer.stack, layer.rank, columns)
    lora_B = weight.new_zeros(*layer.stack, rows, layer.rank)
    start, errors, norms = None, [], []
    for _ in range(options.loftq_iter):
        replacement = Replacement(quantizer, lora_A, lora_B)
        base = replacement.base(weight, scaling)
        residual = torch.sub(weight, base, out=base)
        norms.append(linalg.frobenius_norm(residual))
        # Quantization noise has a flat spectrum, so the last iteration's subspace is the best
        # start. The objective, not the subspace, decides when to stop.
        triplets = linalg.top_singular(residual, layer.rank, generator=layer.generator, start=start)
        start = triplets.right
        root = (triplets.values / scaling).sqrt()
        lora_A, lora_B = root[..., None] * triplets.right.mT, triplets.left * root[..., None, :]
        # U S Vᵀ is a projection of the residual, so the rest's norm follows without forming it.
        left = norms[-1].square() - triplets.values.double().square().sum(-1)
        errors.append(left.clamp_min(0).sqrt() / norm)
    return Factors(
        lora_A,
        lora_B,
        replacement=replacement,
        metrics=error_figures(errors, norms[0] / norm)
        | {"quantizer": quantizer.name, "algorithm": triplets.method},
    )


def error_figures(errors: list[Tensor], plain: Tensor) -> dict[str, Any]:
    """Relative errors of W after each iteration and without an adapter.

    Numbers for one layer, read from the device in one copy; tensors for a stack.
    """
    figures = {
        "error": errors[-1],
        "error_by_iteration": torch.stack(errors, dim=-1),
        "error_without_adapter": plain,
    }
    return figures if plain.ndim else named_on_host(**figures)
