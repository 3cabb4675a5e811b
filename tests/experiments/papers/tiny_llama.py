"""A causal model of a few thousand weights, for what needs any model at all."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def some_blocks(count: int = 6, length: int = 8) -> torch.Tensor:
    return torch.randint(40, (count, length), generator=torch.Generator().manual_seed(1))
