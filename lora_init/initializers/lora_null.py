"""LoRA-Null: the adapter takes that part of the weight which what is known never calls for.

R = XᵀX / tokens, the uncentred second moment of the inputs on data that stands for what the model
knows; N (in × r) = its last r eigenvectors. With W N = U S Zᵀ (thin) and V = N Z,

    B = U sqrt(S / s),    A = sqrt(S / s) Vᵀ,    s B A = W N Nᵀ,

which the base loses: W - s B A. Of the inputs in those data hardly anything passes through A: the
start leaves their outputs to the base, and so does every B as long as A's rows stay where they are.
`lora_null_frozen` does not train A.

Source: Tang et al., "LoRA-Null: Low-Rank Adaptation via Null Space for Large Language Models",
2025, arXiv 2503.02659 (v2: "Put the Space of LoRA Initialization to the Extreme to Preserve
Pre-trained Knowledge"); the second form is their LoRA-Null-v2.
Deviations: they decompose the (in × tokens) inputs, of which N are the last left singular vectors:
the same subspace. W N Nᵀ is theirs to decompose as an (out × in) matrix, ours by W N alone, r
columns wide. Where the data leave more than r directions unused, any r of them are N, theirs and
ours. The report has `inputs_used`, the share of the inputs' mean square that falls on N. Not in
PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from lora_init import linalg
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.registry import CalibrationRequest, Options, batched, register_initializer
from lora_init.weights.module_types import LINEAR_TYPES


@dataclass
class LoraNullOptions(Options):
    """LoRA-Null has no settings."""

    def input_request(self) -> CalibrationRequest:
        return CalibrationRequest(smallest=True)


@dataclass
class LoraNullFrozenOptions(LoraNullOptions):
    """The second form has no settings either: A is not trained."""

    frozen = ("lora_A",)


register = partial(
    register_initializer,
    paper="Tang et al. 2025, arXiv 2503.02659",
    base="subtract",
    reads=("weight", "inputs"),
    modules=(*LINEAR_TYPES, "Conv2d"),
)


@register("lora_null_frozen", options=LoraNullFrozenOptions)
@register("lora_null", options=LoraNullOptions)
@batched
def lora_null(layer: Layer, options: LoraNullOptions) -> Factors:
    """A (rank, in) and B (out, rank), float32; s B A = W N Nᵀ, A Aᵀ = Bᵀ B = S / s."""
    unused = layer.inputs.least_directions(layer.rank)
    left, values, turns = linalg.thin_svd(layer.weight.double() @ unused)
    root = (values / layer.scaling).sqrt()
    second_moment = layer.inputs.second_moment
    total = second_moment.diagonal(dim1=-2, dim2=-1).sum(-1)
    used = (unused * (second_moment @ unused)).sum((-2, -1)) / total
    return Factors(
        lora_A=(root[..., None] * (turns @ unused.mT)).float(),
        lora_B=(left * root[..., None, :]).float(),
        metrics={"inputs_used": used.clamp_min(0)},
    )
