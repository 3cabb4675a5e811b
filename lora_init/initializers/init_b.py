"""Init[B]: initialize B with uniform random numbers, and A with zero.

A = 0, B ~ U(-1/sqrt(r), 1/sqrt(r)). The base stays, and B A = 0. It is LoRA's usual start with the
roles of A and B exchanged: at step 0 only A gets a gradient, s Bᵀ G.

As the width n grows, the stable learning rate falls as n^(-1/2) for `kaiming`, and as n^(-1) here.
B then hardly moves, and training changes mostly A. Compare the two at their own learning rates.

Source: Hayou, Ghosh & Yu, "The Impact of Initialization on LoRA Finetuning Dynamics", NeurIPS
2024, arXiv 2406.08447.
Deviations: the paper draws B with variance 1/r. This code draws the B of `random`, which has a
third of that variance, so that both starts have the distribution of nn.Linear. B is not divided by
the scaling. PEFT does not have this method; on embeddings its default is of this kind, with
B ~ N(0, 1).
"""

from __future__ import annotations

from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.linalg.draws import uniform, zeros
from lora_init.registry import Options, register_initializer


@register_initializer(
    "init_b",
    paper="Hayou, Ghosh & Yu 2024, arXiv 2406.08447",
    operations=("product", "convolution", "lookup"),
)
def init_b(layer: Layer, options: Options) -> Factors:
    """A (rank, in) zero, B (out, rank) uniform within ±1/sqrt(rank); float32."""
    rows, columns = layer.shape
    lora_B = (2 * uniform(rows, layer.rank, generator=layer.generator) - 1) * layer.rank**-0.5
    return Factors(zeros(layer.rank, columns), lora_B)
