"""Init[AB], or NZLoRA: initialize both factors with small uniform random numbers.

A ~ U(-gamma / sqrt(in), gamma / sqrt(in)), and B has the same distribution: its bound uses in, not
out or r. At gamma = 1, A equals that of `kaiming`. There are two methods:

- "init_ab" keeps the base. The model starts with noise of size
  ‖s B A‖_F ≈ s gamma² sqrt(out r / in) / 3 in its weights. The paper finds that this does not harm
  fine-tuning.
- "init_ab_subtracted" subtracts it, W - s B A, and starts from the pretrained function.

Source: Li, Luo, Tang, Wang, Chen, Luo, Li, He & Li, "Beyond Zero Initialization: Investigating the
Impact of Non-Zero Initialization on LoRA Fine-Tuning Dynamics", ICML 2025, arXiv 2505.23194.
Deviations: one gamma for both factors. The published code has one scale for each, under the square
root (gamma² here). As there, the factors are not divided by the scaling, so the noise grows with s.
PEFT does not have this method: its `init_lora_weights=False` draws B from the wider
U(±1 / sqrt(r)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.linalg.draws import uniform
from lora_init.registry import Options, register_initializer

PAPER = "Li et al. 2025, arXiv 2505.23194"


@dataclass
class InitAbOptions(Options):
    """Settings of Init[AB].

    Attributes:
        gamma: the bound of the entries of both factors, as a multiple of 1 / sqrt(in).
    """

    method: ClassVar[str] = "init_ab"

    gamma: float = 1.0

    def __post_init__(self) -> None:
        number = isinstance(self.gamma, int | float) and not isinstance(self.gamma, bool)
        if not number or not 0.0 < self.gamma < float("inf"):
            raise ValueError(
                f"{self.method}: gamma={self.gamma!r} is not supported: must be a finite number > 0"
            )


@dataclass
class InitAbSubtractedOptions(InitAbOptions):
    """Settings of Init[AB] with a subtracted base."""

    method: ClassVar[str] = "init_ab_subtracted"


@register_initializer(
    "init_ab_subtracted",
    options=InitAbSubtractedOptions,
    paper=PAPER,
    base="subtract",
    operations=("product", "convolution", "lookup"),
)
@register_initializer(
    "init_ab",
    options=InitAbOptions,
    paper=PAPER,
    preserves_output=False,
    operations=("product", "convolution", "lookup"),
)
def init_ab(layer: Layer, options: InitAbOptions) -> Factors:
    """A (rank, in) and B (out, rank), float32, uniform within ±gamma/sqrt(in)."""
    rows, columns = layer.shape
    bound = options.gamma * columns**-0.5
    lora_A = (2 * uniform(layer.rank, columns, generator=layer.generator) - 1) * bound
    lora_B = (2 * uniform(rows, layer.rank, generator=layer.generator) - 1) * bound
    return Factors(lora_A, lora_B)
