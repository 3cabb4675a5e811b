"""LoRA's original initialization: A is Kaiming-uniform and B is zero.

A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0. The bound is that of `kaiming_uniform_` with a = sqrt(5), the
default of nn.Linear: gain sqrt(2 / (1 + 5)) · sqrt(3 / in) = 1/sqrt(in).

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685.
Deviations: section 4.1 of the paper says "random Gaussian for A". Its official code (loralib) and
PEFT draw from the uniform distribution above, and so does this code; `gaussian` draws from the
normal distribution. On an embedding A = 0 and B ~ N(0, 1), as in loralib and PEFT. Training then
changes only the rows of entries that occur.
"""

from __future__ import annotations

from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.linalg.draws import normal, uniform, zeros
from lora_init.registry import Options, register_initializer


def embedding(layer: Layer) -> Factors:
    """A (rank, entries) zero, B (width, rank) standard normal; float32."""
    rows, columns = layer.shape
    return Factors(zeros(layer.rank, columns), normal(rows, layer.rank, generator=layer.generator))


@register_initializer(
    "kaiming",
    paper="Hu et al. 2021, arXiv 2106.09685",
    operations=("product", "convolution", "lookup"),
)
def kaiming(layer: Layer, options: Options) -> Factors:
    """A (rank, in) uniform within ±1/sqrt(in), B (out, rank) zero; float32."""
    if layer.kind == "Embedding":
        return embedding(layer)
    rows, columns = layer.shape
    bound = columns**-0.5
    lora_A = uniform(layer.rank, columns, generator=layer.generator).mul_(2 * bound).sub_(bound)
    return Factors(lora_A, zeros(rows, layer.rank))
