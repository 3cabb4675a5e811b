"""Initialize A from a normal distribution, and B with zero.

A ~ N(0, (1/r)²), B = 0. The standard deviation depends on the rank and not on the width: at the
same rank, A x is larger for a wide layer than under `kaiming`.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1 ("random Gaussian initialization for A"). The
paper gives no variance; 1/r is what diffusers and PEFT use. On an embedding the method equals
`kaiming`: A = 0, B ~ N(0, 1).
"""

from __future__ import annotations

from lora_init.factors import Factors
from lora_init.initializers.kaiming import embedding
from lora_init.layer import Layer
from lora_init.linalg.draws import normal, zeros
from lora_init.registry import Options, register_initializer


@register_initializer(
    "gaussian",
    paper="Hu et al. 2021, arXiv 2106.09685, section 4.1",
    operations=("product", "convolution", "lookup"),
)
def gaussian(layer: Layer, options: Options) -> Factors:
    """A (rank, in) normal with standard deviation 1/rank, B (out, rank) zero; float32."""
    if layer.kind == "Embedding":
        return embedding(layer)
    rows, columns = layer.shape
    lora_A = normal(layer.rank, columns, generator=layer.generator).div_(layer.rank)
    return Factors(lora_A, zeros(rows, layer.rank))
