"""Both factors random: `init_lora_weights=False`, for debugging.

A ~ U(±1/sqrt(in)), B ~ U(±1/sqrt(rank)): what two nn.Linear layers hold when nobody initializes
them. The model's function changes at step 0, on purpose: a test that passes under this method
shows that an adapter is really active.

Deviations: none from PEFT's distribution, except on embeddings, where PEFT draws both factors from
N(0, 1); PEFT draws from the global generator.
"""

from __future__ import annotations

from lora_init.factors import Factors
from lora_init.linalg.draws import uniform
from lora_init.registry import register_initializer
from lora_init.weights.kinds import MODULE_TYPES


@register_initializer(
    "random",
    paper="debugging aid, no paper",
    preserves_output=False,
    module_types=MODULE_TYPES,
)
def random(weight, rank, scaling, statistics, options, generator) -> Factors:
    """A (rank, in) within ±1/sqrt(in), B (out, rank) within ±1/sqrt(rank); float32."""
    rows, columns = weight.shape
    lora_A = (2 * uniform(rank, columns, generator=generator) - 1) * columns**-0.5
    lora_B = (2 * uniform(rows, rank, generator=generator) - 1) * rank**-0.5
    return Factors(lora_A, lora_B)
