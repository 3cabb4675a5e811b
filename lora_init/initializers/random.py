"""Both factors random: `init_lora_weights=False`, for debugging.

A ~ U(±1/sqrt(in)), B ~ U(±1/sqrt(rank)): what two nn.Linear layers hold when nobody initializes
them. The model's function changes at step 0, on purpose: a test that passes under this method
shows that an adapter is really active.

Deviations: none from PEFT's distribution, except on embeddings, where PEFT draws both factors from
N(0, 1); PEFT draws from the global generator.
"""

from __future__ import annotations

from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.linalg.draws import uniform
from lora_init.registry import Options, register_initializer
from lora_init.weights.module_types import MODULE_TYPES


@register_initializer(
    "random",
    paper="debugging aid, no paper",
    preserves_output=False,
    modules=MODULE_TYPES,
)
def random(layer: Layer, options: Options) -> Factors:
    """A (rank, in) within ±1/sqrt(in), B (out, rank) within ±1/sqrt(rank); float32."""
    rows, columns = layer.shape
    lora_A = (2 * uniform(layer.rank, columns, generator=layer.generator) - 1) * columns**-0.5
    lora_B = (2 * uniform(rows, layer.rank, generator=layer.generator) - 1) * layer.rank**-0.5
    return Factors(lora_A, lora_B)
