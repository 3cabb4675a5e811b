"""GoRA: ranks go to the layers whose weights the loss leans on most, B starts as their gradient.

G = dL/dW, the mean gradient over the calibration batches. Ranks, from the planned r of each layer,
with I = mean |W ∘ G| (the loss's change if a weight were left out, to first order) and m + n rows
and columns:

    r' = round(a Σ r √(m + n) / √(m + n)),    a = I / Σ I,

held between `smallest`·r and `largest`·r. Then A is Kaiming-uniform and B the closest to a step of
gradient descent that A allows:

    A ~ U(±1/√in),    B = -(gamma √(in / r') / s) G Aᵀ (A Aᵀ)⁻¹.

s B A is -gamma √(in / r') times the part of G in A's rows' span, a share of √(r' / in) of its norm:
‖s B A‖ ≈ gamma ‖G‖, whatever s and r'. The base stays, the model's function takes that step.

Source: He et al., "GoRA: Gradient-driven Adaptive Low Rank Adaptation", NeurIPS 2025, arXiv
2502.12171; the bounds are those of the authors' code.
Deviations: the paper writes B's factor as gamma √in / alpha, at its scaling alpha / √r (rsLoRA);
ours divides by s and takes the same step at any scaling, as the official code does. The official
code rounds down where the paper rounds, and bounds ranks by numbers (4 and 32 at r = 8: the
defaults here, as multiples of r). A Aᵀ has a small number added to its diagonal there; here it is
solved with in float64. As there, a layer keeps the scaling of its planned rank, and the number of
parameters is about what was planned, not exactly. Gradients are those of
`lora_init.initializers.lora_ga`. Not in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lora_init.allocation import LayerRequest
from lora_init.factors import Factors
from lora_init.initializers.kaiming import kaiming
from lora_init.layer import Layer
from lora_init.registry import Options, register_initializer
from lora_init.weights.module_types import LINEAR_TYPES


@dataclass
class GoraOptions(Options):
    """Settings of GoRA.

    Attributes:
        gamma: of the first step: its norm is about gamma times the gradient's.
        smallest: a layer's rank is at least this multiple of its planned one; 0 lets it go without.
        largest: and at most this one; 1.0 for both keeps all ranks uniform.
    """

    gamma: float = 0.05
    smallest: float = 0.5
    largest: float = 4.0

    def __post_init__(self) -> None:
        for name in ("gamma", "smallest", "largest"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0.0 <= value < math.inf or (name == "gamma" and value == 0):
                allowed = "> 0" if name == "gamma" else ">= 0"
                raise ValueError(f"gora: {name}={value!r}; allowed are finite numbers {allowed}")
        if self.smallest > 1.0 or self.largest < 1.0:
            raise ValueError(
                f"gora: smallest={self.smallest!r}, largest={self.largest!r}; the planned rank is "
                "between them: smallest <= 1 <= largest"
            )

    def allocate(self, requests: Mapping[str, LayerRequest]) -> dict[str, int]:
        """Each layer's share of all ranks is that of its importance, within the bounds."""
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
    """mean |W ∘ G|, summed in float64."""
    gradient = layer.statistics.gradient
    weight = layer.weight().to(gradient.device, gradient.dtype)
    return float((weight * gradient).abs_().mean(dtype=torch.float64))


@register_initializer(
    "gora",
    options=GoraOptions,
    paper="He et al. 2025, arXiv 2502.12171",
    preserves_output=False,
    reads=("gradient", "weight"),
    modules=(*LINEAR_TYPES, "Conv2d"),
)
def gora(layer: Layer, options: GoraOptions) -> Factors:
    """A (rank, in) Kaiming-uniform, B (out, rank) the step's coordinates; float32."""
    gradient = layer.gradient
    lora_A = kaiming(layer, Options()).lora_A
    basis = lora_A.to(gradient.device).double()
    projected = (gradient @ basis.T.to(gradient.dtype)).double()
    size = options.gamma * math.sqrt(basis.shape[1] / layer.rank) / layer.scaling
    lora_B = -size * torch.linalg.solve(basis @ basis.T, projected, left=False)
    return Factors(lora_A, lora_B.float())
