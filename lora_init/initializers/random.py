"""Initialize both factors with random numbers, for debugging (`init_lora_weights=False`).

A ~ U(±1/sqrt(in)), B ~ U(±1/sqrt(rank)): the defaults of two nn.Linear layers. The model's output
changes at step 0. So a test that passes with this method shows that an adapter is really active.

Deviations: on embeddings, PEFT draws both factors from N(0, 1). PEFT draws from the global
generator; here each layer has a seeded generator. The distribution is otherwise the same.
"""

from __future__ import annotations

from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.linalg.draws import uniform
from lora_init.registry import Options, register_initializer


@register_initializer(
    "random",
    paper="debugging aid, no paper",
    preserves_output=False,
    operations=("product", "convolution", "lookup"),
)
def random(layer: Layer, options: Options) -> Factors:
    """A (rank, in) within ±1/sqrt(in), B (out, rank) within ±1/sqrt(rank); float32."""
    rows, columns = layer.shape
    lora_A = (2 * uniform(layer.rank, columns, generator=layer.generator) - 1) * columns**-0.5
    lora_B = (2 * uniform(rows, layer.rank, generator=layer.generator) - 1) * layer.rank**-0.5
    return Factors(lora_A, lora_B)
