"""Adapted embeddings."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lora_init.layers.base import LoraLayer
from lora_init.weights.embedding import embedding_scale


class EmbeddingLayer(LoraLayer):
    """``h = base(ids) + s B A[:, ids]``: the embedding is a linear map of one-hot inputs.

    A is (rank, entries), B is (width, rank). Dropout does not apply, because the input is an index.
    """

    drops_inputs = False

    def _low_rank(
        self,
        x: Int[Tensor, "*batch"],
        lora_A: Float[Tensor, "rank entries"],
        lora_B: Float[Tensor, "width rank"],
    ) -> Float[Tensor, "*batch width"]:
        # As in the base layer, the padding entry gets no gradient.
        hidden = functional.embedding(x, lora_A.T, self.base_layer.padding_idx) * self.scaling
        rows = functional.linear(hidden, lora_B)
        scale = embedding_scale(self.base_layer)
        return rows if scale is None else rows * scale

    def _base_without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.base_layer(x), None
