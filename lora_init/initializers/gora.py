"""GoRA: give more rank to layers that matter for the loss, and start B with a gradient step.

G = dL/dW is the mean gradient over the calibration batches. The importance of a layer is
I = mean |W ∘ G|: to first order, how much the loss changes if a weight is removed. For a layer with
m rows, n columns and planned rank r, the new rank is

    r' = round(a Σ r √(m + n) / √(m + n)),    a = I / Σ I,

limited to between `smallest`·r and `largest`·r. A is Kaiming-uniform. B makes the product the
gradient descent step that A allows:

    A ~ U(±1/√in),    B = -(gamma √(in / r') / s) G Aᵀ (A Aᵀ)⁻¹.

s B A is -gamma √(in / r') times the projection of G on the span of A's rows. That projection has
about √(r' / in) of the norm of G, so ‖s B A‖ ≈ gamma ‖G‖ for every s and r'. The base stays, so the
model's output changes at step 0.

Source: He et al., "GoRA: Gradient-driven Adaptive Low Rank Adaptation", NeurIPS 2025, arXiv
2502.12171; the bounds are those of the authors' code.
Deviations: the paper writes the factor of B as gamma √in / alpha for the scaling alpha / √r
(rsLoRA). This code divides by s and takes the same step at any scaling, as the official code does.
The official code rounds down where the paper rounds to the nearest. It limits ranks to 4 and 32 at
r = 8; the defaults here are the same limits as multiples of r. It adds a small number to the
diagonal of A Aᵀ; this code solves in float64. As in the official code, a layer keeps the scaling of
its planned rank, and the number of parameters is only approximately the planned one. The gradients
are those of `lora_init.initializers.lora_ga`. PEFT does not have this method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_init.factors import Factors
from lora_init.initializers.kaiming import kaiming
from lora_init.layer import Layer, LayerRequest
from lora_init.registry import Options, register_initializer, workspace


@dataclass
class GoraOptions(Options):
    """Settings of GoRA.

    Attributes:
        gamma: the norm of s B A, relative to the norm of the gradient.
        smallest: least rank of a layer as a multiple of its planned rank; 0 allows no adapter.
        largest: greatest rank of a layer as a multiple of its planned rank.
    """

    gamma: float = 0.05
    smallest: float = 0.5
    largest: float = 4.0

    def __post_init__(self) -> None:
        for name in ("gamma", "smallest", "largest"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0.0 <= value < math.inf or (name == "gamma" and value == 0):
                limit = "> 0" if name == "gamma" else ">= 0"
                raise ValueError(
                    f"gora: {name}={value!r} is not supported: must be a finite number {limit}"
                )
        if self.smallest > 1.0 or self.largest < 1.0:
            raise ValueError(
                f"gora: smallest={self.smallest!r}, largest={self.largest!r} is not supported: "
                "must be smallest <= 1 <= largest"
            )

    def allocate(self, requests: Mapping[str, LayerRequest]) -> dict[str, int]:
        """Distribute the ranks in proportion to the layers' importance, within the bounds."""
        importances = {name: importance(layer) for name, layer in requests.items()}
        total = sum(importances.values())
        if total == 0:
            raise ValueError(
                "gora: the loss has no gradient in any target; pass batches whose loss depends on "
                "the targets"
            )
        lengths = {name: math.sqrt(sum(layer.shape)) for name, layer in requests.items()}
        budget = sum(layer.rank * lengths[name] for name, layer in requests.items())
        ranks = {}
        for name, layer in requests.items():
            wanted = round(importances[name] / total * budget / lengths[name])
            least = math.ceil(self.smallest * layer.rank)
            most = min(math.floor(self.largest * layer.rank), *layer.shape)
            ranks[name] = max(least, min(wanted, most))
        return ranks


def importance(layer: LayerRequest) -> float:
    """The importance of a layer: mean |W ∘ G|, summed in float64."""
    gradient = layer.statistics.gradient
    assert isinstance(gradient, Tensor)  # a method that chooses ranks gets no sketches
    weight = layer.weight().to(gradient.device, gradient.dtype)
    return float((weight * gradient).abs_().mean(dtype=torch.float64))


@register_initializer(
    "gora",
    options=GoraOptions,
    paper="He et al. 2025, arXiv 2502.12171",
    preserves_output=False,
    reads=("gradient", "weight"),
    operations=("product", "convolution"),
)
@workspace(3.0, 0.0)
def gora(layer: Layer, options: GoraOptions) -> Factors:
    """A (rank, in) Kaiming-uniform, B (out, rank) from the gradient; float32."""
    gradient = layer.gradient
    lora_A = kaiming(layer, Options()).lora_A
    basis = lora_A.to(gradient.device).double()
    projected = (gradient @ basis.T.to(gradient.dtype)).double()
    size = options.gamma * math.sqrt(basis.shape[1] / layer.rank) / layer.scaling
    lora_B = -size * torch.linalg.solve(basis @ basis.T, projected, left=False)
    return Factors(lora_A, lora_B.float())
