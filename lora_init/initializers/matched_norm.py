"""Gaussian factors whose product has the norm of another method's: magnitude and nothing else.

With G (r × in) and H (out × r) standard normal, scaled to one common Frobenius norm a,

    A = a G / ‖G‖, B = a H / ‖H‖, a such that ‖B A‖ = ‖B' A'‖; the base becomes W - s B A,

where B', A' are the factors of the reference, by default PiSSA's.

A control: beside the reference it has the same ‖s B A‖ in every layer. Neither directions nor the
spectrum are the reference's (a product of tall Gaussian factors has nearly equal singular values);
`random_bases` keeps the spectrum too.

Source: a control of this project, for the claim (LoRAM, 2025) that the magnitude of a spectral
start explains its speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_init.factors import Factors
from lora_init.linalg.draws import normal
from lora_init.registry import get_initializer, list_initializers, register_initializer
from lora_init.weights.kinds import MODULE_TYPES


@dataclass
class MatchedNormOptions:
    """Settings of the control.

    Attributes:
        reference: the registered method whose ‖s B A‖ is taken, with its default options. It
            reads weights only and subtracts its product from the base: pissa or olora, say.
    """

    reference: str = "pissa"

    def __post_init__(self) -> None:
        if self.reference not in references():
            raise ValueError(
                f"matched_norm: reference={self.reference!r}; allowed are methods that start from "
                f"the weight alone and subtract: {', '.join(references())}"
            )


def references() -> list[str]:
    """Methods that have a product to match and need nothing but the weight."""
    return [
        spec.name
        for spec in list_initializers()
        if spec.base == "subtract" and spec.needs == {"weights"} and not spec.control
    ]


@register_initializer(
    "matched_norm",
    options=MatchedNormOptions,
    paper="control, no paper",
    base="subtract",
    needs=("weights",),
    module_types=MODULE_TYPES,
    stacks=True,
    control=True,
)
def matched_norm(weight, rank, scaling, statistics, options, generator) -> Factors:
    """A (rank, in) and B (out, rank) of equal Frobenius norm, float32."""
    rows, columns = weight.shape[-2:]
    drawn = []
    for each in generator if weight.ndim > 2 else [generator]:
        lora_A = normal(rank, columns, generator=each, dtype=torch.float64)
        lora_B = normal(rows, rank, generator=each, dtype=torch.float64)
        drawn.append((lora_A / lora_A.norm(), lora_B / lora_B.norm()))
    lora_A, lora_B = (torch.stack(part).to(weight.device) for part in zip(*drawn, strict=True))
    if weight.ndim == 2:
        lora_A, lora_B = lora_A[0], lora_B[0]
    wanted = _reference_norm(options.reference, weight, rank, scaling, generator)
    size = (wanted / product_norm(lora_A, lora_B)).sqrt()[..., None, None]
    return Factors((size * lora_A).float(), (size * lora_B).float())


def _reference_norm(name, weight, rank, scaling, generator) -> Tensor:
    """‖B' A'‖ of the reference, of one layer or of each of a stack."""
    spec = get_initializer(name)
    if weight.ndim > 2 and not spec.stacks:
        pairs = zip(weight, generator, strict=True)
        return torch.stack([_reference_norm(name, w, rank, scaling, each) for w, each in pairs])
    start = spec.function(weight, rank, scaling, None, spec.options(), generator)
    return product_norm(start.lora_A, start.lora_B)


def product_norm(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """‖B A‖, from the factors' r × r Gram matrices in float64."""
    lora_A, lora_B = lora_A.double(), lora_B.double()
    return ((lora_B.mT @ lora_B) * (lora_A @ lora_A.mT)).sum((-2, -1)).clamp_min(0).sqrt()
