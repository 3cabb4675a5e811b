"""Llama decoder blocks with synthetic weights, built on the device where they will be used.

The linear weights have power-law spectra (s_i = s_1 i^-0.7); embeddings and head are random. Times
equal those of a real model of the same shapes. Losses mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..benchmark.powerlaw import PowerLaw

LINEAR = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model. `blocks` is the number of blocks of the whole model."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    blocks: int
    vocabulary: int = 32000


LLAMA_2_7B = Shape("Llama-2-7B", 4096, 11008, 32, 32, 32)
LLAMA_1B = Shape("a 1B Llama", 2048, 8192, 32, 8, 16)
TINY = Shape("a tiny Llama", 64, 96, 4, 2, 2, 96)


def llama(
    shape: Shape,
    blocks: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    *,
    spectra: bool = True,
) -> nn.Module:
    """A causal language model with this number of blocks.

    Args:
        spectra: give the linear weights power-law spectra. Random weights suffice where the time
            does not depend on them.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if spectra:
        with torch.no_grad():
            for name in targets(blocks):
                weight = model.get_submodule(name).weight
                weight.copy_(PowerLaw(*weight.shape, name).weight(weight.device))
    return model


def targets(blocks: int) -> list[str]:
    """The names of all linear layers of the first blocks."""
    return [f"model.layers.{block}.{name}" for block in range(blocks) for name in LINEAR]


def token_batches(
    shape: Shape, count: int, rows: int, length: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Random tokens with themselves as labels."""
    generator = torch.Generator().manual_seed(1)
    size = (count, rows, length)
    tokens = torch.randint(shape.vocabulary, size, generator=generator).to(device)
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in tokens
    ]
