"""Weights of nn.Embedding: a linear map of one-hot vectors, stored as (entries, width)."""

from __future__ import annotations

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_init.weights.float import FloatFormat
from lora_init.weights.format import register_weight_format


class EmbeddingFormat(FloatFormat):
    """nn.Embedding, and transformers' scaled word embeddings.

    The adapted layer multiplies by `embedding_scale` as the latter do, so they are not probed.
    """

    name = "Embedding"
    cls = nn.Embedding
    operation = "lookup"
    transposed = True

    def has_own_forward(self, module: nn.Module) -> bool:
        return super().has_own_forward(module) and embedding_scale(module) is None

    def refusal(self, module: nn.Module) -> str | None:
        if (bound := cast(nn.Embedding, module).max_norm) is not None:
            return (
                f"is an Embedding with max_norm={bound}, which rescales its weight in "
                "every forward pass"
            )
        return super().refusal(module)

    def input_rows(self, module: nn.Module, x: Tensor) -> Float[Tensor, "positions in"]:
        weight = cast(nn.Embedding, module).weight
        return functional.one_hot(x.flatten(), len(weight)).to(weight.dtype)


register_weight_format(EmbeddingFormat())


def embedding_scale(module: nn.Module) -> float | Tensor | None:
    """The factor that scales the rows of a scaled word embedding; None for a plain embedding."""
    scaled = type(module).__name__.endswith("ScaledWordEmbedding")
    return getattr(module, "embed_scale", None) if scaled else None
