"""LoRA-Null: initialize the adapter from the part of W that acts on the null space of the inputs.

The calibration data represent what the model knows and must keep. R = XᵀX / tokens is the
uncentered second moment of the inputs, and N (in × r) holds its last r eigenvectors. With
W N = U S Zᵀ (thin) and V = N Z,

    B = U sqrt(S / s),    A = sqrt(S / s) Vᵀ,    s B A = W N Nᵀ,

and the base becomes W - s B A. The calibration inputs give almost zero A x. So training B does not
change the outputs for them, as long as A keeps its rows. `lora_null_frozen` does not train A.

Source: Tang et al., "LoRA-Null: Low-Rank Adaptation via Null Space for Large Language Models",
2025, arXiv 2503.02659 (v2: "Put the Space of LoRA Initialization to the Extreme to Preserve
Pre-trained Knowledge"). `lora_null_frozen` is their LoRA-Null-v2.
Deviations: the authors decompose the (in × tokens) inputs. N holds their last left singular
vectors, which span the same subspace. The authors decompose the (out × in) matrix W N Nᵀ; this code
decomposes W N, which has r columns. Where the data leave more than r directions unused, N is any r
of them, in both. The report shows `inputs_used`, the share of the inputs' mean square that lies
in N. PEFT does not have this method.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import CalibrationRequest, Options, batched, register_initializer, workspace


@dataclass
class LoraNullOptions(Options):
    """Settings of LoRA-Null: none."""

    def input_request(self) -> CalibrationRequest:
        return CalibrationRequest(smallest=True)


@dataclass
class LoraNullFrozenOptions(LoraNullOptions):
    """Settings of LoRA-Null with a frozen A: none."""

    frozen = ("lora_A",)


register = partial(
    register_initializer,
    paper="Tang et al. 2025, arXiv 2503.02659",
    base="subtract",
    reads=("weight", "inputs"),
    operations=("product", "convolution"),
)


@register("lora_null_frozen", options=LoraNullFrozenOptions)
@register("lora_null", options=LoraNullOptions)
@batched
@workspace(2.0, 6.5)
def lora_null(layer: Layer, options: LoraNullOptions) -> Factors:
    """A (rank, in) and B (out, rank), float32; s B A = W N Nᵀ, A Aᵀ = Bᵀ B = S / s."""
    unused = layer.inputs.least_directions(layer.rank)
    left, values, turns = linalg.thin_svd(layer.weight.double() @ unused)
    root = (values / layer.scaling).sqrt()
    return Factors(
        lora_A=(root[..., None] * (turns @ unused.mT)).float(),
        lora_B=(left * root[..., None, :]).float(),
        metrics={"inputs_used": used_share(layer.inputs.second_moment, unused)},
    )


def used_share(
    moment: Float[Tensor, "*stack in in"], directions: Float[Tensor, "*stack in rank"]
) -> Float[Tensor, "*stack"]:
    """The share of the inputs' mean square that lies in the span of orthonormal directions."""
    total = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((directions * (moment @ directions)).sum((-2, -1)) / total).clamp_min(0)
