"""Initialize the adapter with the best rank-r part of the difference from a second weight.

W1 is the weight of the same layer in a second checkpoint, or that of the base with another adapter.
With D = W1 - W = U S Vᵀ,

    B = U_r sqrt(S_r / s),    A = sqrt(S_r / s) V_rᵀ,    s B A = D_r,

the best rank-r approximation of D. There are two methods:

- "from_delta" keeps the base, so the model starts as the best rank-r copy of the second model.
  With form="directions", A = V_rᵀ and B = 0: it starts as the first model and takes only the
  directions of D.
- "from_delta_subtracted" subtracts the product, so the first model starts in the directions and
  with the sizes of D.

Source: a definition of this project. HRP (arXiv 2502.07739) takes the directions of a short run at
a higher rank; save this run as an adapter, and use form="directions".
Deviations: the scale of HRP's factors was not verified, so this is not registered as HRP. Where D
has fewer than r singular values above its rounding, the other rows of A are drawn like those of
`kaiming`, and their columns of B are zero. Both factors would otherwise be zero and never learn.
Checkpoints in 16 bits add rounding to D. The report shows `kept_share`, the share of ‖D‖² that D_r
holds, and ‖D‖ / ‖W‖ as `change`. PEFT does not have this method.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.linalg.draws import uniform
from lora_init.registry import Options, register_initializer, workspace

FORMS = ("product", "directions")
# Smaller singular values of D, relative to the largest, are rounding.
ROUNDING = 1e-6


@dataclass
class FromDeltaOptions(Options):
    """Settings of the start from a difference.

    Attributes:
        form: "product" (s B A = D_r), or "directions" (A = V_rᵀ, B = 0).
    """

    form: str = "product"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(
                f"from_delta: form={self.form!r} is not supported: must be one of "
                f"{', '.join(FORMS)}"
            )


@dataclass
class FromDeltaSubtractedOptions(Options):
    """Settings of the start from a difference with a subtracted base: none."""


register = partial(
    register_initializer,
    paper="a definition of this project",
    reads=("weight", "target_weight"),
    operations=("product", "convolution", "lookup"),
)


@register("from_delta_subtracted", options=FromDeltaSubtractedOptions, base="subtract")
@register("from_delta", options=FromDeltaOptions, preserves_output=False)
@workspace(6.5, 0.0)
def from_delta(layer: Layer, options: FromDeltaOptions | FromDeltaSubtractedOptions) -> Factors:
    """A (rank, in) and B (out, rank), float32; balanced, or A orthonormal and B zero."""
    difference = (layer.target_weight.double() - layer.weight.double()).float()
    triplets = linalg.top_singular(difference, layer.rank, generator=layer.generator)
    values, lora_A, lora_B = triplets.values, triplets.right.mT, triplets.left
    tiny = torch.finfo(torch.float32).tiny
    lost = values <= (ROUNDING * values[:1]).clamp_min(tiny)
    if getattr(options, "form", "product") == "directions":
        lora_B = torch.zeros_like(lora_B)
    else:
        root = (values / layer.scaling).sqrt()
        rows = uniform(layer.rank, layer.shape[1], generator=layer.generator)
        drawn = ((2 * rows - 1) * layer.shape[1] ** -0.5).to(lora_A.device)
        lora_A = torch.where(lost[:, None], drawn, root[:, None] * lora_A)
        lora_B = torch.where(lost, 0.0, root * lora_B)
    norm = linalg.frobenius_norm(difference)
    kept = values.double().square().sum() / norm.double().square().clamp_min(tiny)
    return Factors(
        lora_A=lora_A,
        lora_B=lora_B,
        metrics={
            "algorithm": triplets.method,
            "residual": triplets.residual,
            "kept_share": kept.clamp_max(1),
            "change": norm / linalg.frobenius_norm(layer.weight).clamp_min(tiny),
            "vanishing_components": lost.sum(),
        },
    )
