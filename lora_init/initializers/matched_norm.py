"""Initialize Gaussian factors whose product has the norm of another method's product (a control).

With G (r × in) and H (out × r) standard normal,

    A = a G / ‖G‖, B = a H / ‖H‖, a such that ‖B A‖ = ‖B' A'‖; the base becomes W - s B A,

where B', A' are the factors of the reference method, PiSSA by default.

In every layer ‖s B A‖ equals that of the reference, but the directions and the
spectrum differ. The product of tall Gaussian factors has nearly equal singular values.
`random_bases` keeps the spectrum too.

Source: a control of this project. It tests the claim (LoRAM, 2025) that the magnitude of a spectral
initialization explains its speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.linalg.draws import normal
from lora_init.registry import (
    Initializer,
    Options,
    batched,
    get_initializer,
    list_initializers,
    register_initializer,
    workspace,
)


@dataclass
class MatchedNormOptions(Options):
    """Settings of the control "matched_norm".

    Attributes:
        reference: the registered method whose ‖s B A‖ is matched, with its default options. It
            must read only the weight and subtract its product, like pissa or olora.
    """

    reference: str = "pissa"

    def __post_init__(self) -> None:
        if self.reference not in references():
            raise ValueError(
                f"matched_norm: reference={self.reference!r} is not supported: must be one of "
                f"{', '.join(references())}"
            )


def references() -> list[str]:
    """Names of the methods that read only the weight and subtract their product from the base."""
    return [
        spec.name
        for spec in list_initializers()
        if spec.base == "subtract" and spec.reads == {"weight"} and not spec.control
    ]


@register_initializer(
    "matched_norm",
    options=MatchedNormOptions,
    paper="control, no paper",
    base="subtract",
    reads=("weight",),
    operations=("product", "convolution", "lookup"),
    control=True,
)
@batched
@workspace(3.0, 0.0)
def matched_norm(layer: Layer, options: MatchedNormOptions) -> Factors:
    """A (rank, in) and B (out, rank) of equal Frobenius norm, float32."""
    (rows, columns), rank = layer.shape, layer.rank
    drawn = []
    for each in layer.generators:
        lora_A = normal(rank, columns, generator=each, dtype=torch.float64)
        lora_B = normal(rows, rank, generator=each, dtype=torch.float64)
        drawn.append((lora_A / lora_A.norm(), lora_B / lora_B.norm()))
    lora_A, lora_B = (
        torch.stack(part).to(layer.weight.device) for part in zip(*drawn, strict=True)
    )
    if not layer.is_stack:
        lora_A, lora_B = lora_A[0], lora_B[0]
    wanted = _reference_norm(get_initializer(options.reference), layer)
    size = (wanted / product_norm(lora_A, lora_B)).sqrt()[..., None, None]
    return Factors((size * lora_A).float(), (size * lora_B).float())


def _reference_norm(spec: Initializer, layer: Layer) -> Float[Tensor, "*stack"]:
    """‖B' A'‖ of the reference."""
    if layer.is_stack and not spec.is_batched:
        return torch.stack([_reference_norm(spec, one) for one in layer.members()])
    start = spec.factors(layer, spec.options())
    return product_norm(start.lora_A, start.lora_B)


def product_norm(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """‖B A‖, from the factors' r × r Gram matrices in float64."""
    lora_A, lora_B = lora_A.double(), lora_B.double()
    return ((lora_B.mT @ lora_B) * (lora_A @ lora_A.mT)).sum((-2, -1)).clamp_min(0).sqrt()
