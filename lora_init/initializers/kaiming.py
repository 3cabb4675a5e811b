"""LoRA's own initialization: A is Kaiming-uniform, B is zero.

A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0. The bound is `kaiming_uniform_` with a = sqrt(5), the default
of nn.Linear: gain sqrt(2 / (1 + 5)) · sqrt(3 / in) = 1/sqrt(in).

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685.
Deviations: the paper's section 4.1 says "random Gaussian for A"; its official code (loralib) and
PEFT draw from the uniform distribution above, and so do we. `gaussian` is the other. On an
embedding it is the other way round, as in loralib and PEFT: A = 0, B ~ N(0, 1), so that only the
rows of entries that occur are ever moved.
"""

from __future__ import annotations

from lora_init.factors import Factors
from lora_init.linalg.draws import normal, uniform, zeros
from lora_init.registry import register_initializer
from lora_init.weights.kinds import MODULE_TYPES


def embedding(weight, rank, scaling, statistics, options, generator) -> Factors:
    """A (rank, entries) zero, B (width, rank) standard normal; float32."""
    rows, columns = weight.shape
    return Factors(zeros(rank, columns), normal(rows, rank, generator=generator))


@register_initializer(
    "kaiming",
    paper="Hu et al. 2021, arXiv 2106.09685",
    module_types=MODULE_TYPES,
    variants={"Embedding": embedding},
)
def kaiming(weight, rank, scaling, statistics, options, generator) -> Factors:
    """A (rank, in) uniform within ±1/sqrt(in), B (out, rank) zero; float32. Reads no weight."""
    rows, columns = weight.shape
    bound = columns**-0.5
    lora_A = uniform(rank, columns, generator=generator).mul_(2 * bound).sub_(bound)
    return Factors(lora_A, zeros(rows, rank))
