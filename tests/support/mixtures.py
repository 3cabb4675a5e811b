"""Tiny mixtures of experts and state-space models, built from transformers' configurations."""

import torch
from models import VOCABULARY, built_once
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
          "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
          "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}  # fmt: skip
MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 40},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "mlp_only_layers": [0]},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": EXPERTS | LATENT,
    "glm4_moe": EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
                           "topk_group": 1, "first_k_dense_replace": 1},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
LINEAR_ROUTERS = {
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 24,
                    "intermediate_size_mlp": 48},
}  # fmt: skip

MAMBA = {"state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4}
MAMBA2 = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 8,
          "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}  # fmt: skip
HEADS = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}
STATE_SPACES = {
    "mamba": MAMBA,
    "mamba2": MAMBA | HEADS,
    "falcon_mamba": MAMBA,
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 64},
    "nemotron_h": {"hybrid_override_pattern": "M*-", "num_hidden_layers": 3, "mamba_num_heads": 8,
                   "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "zamba2": {"mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1,
               "chunk_size": 16, "num_mem_blocks": 1, "hybrid_layer_ids": [1],
               "layers_block_type": ["mamba", "hybrid"], "adapter_rank": 4},
    "granitemoehybrid": MAMBA2 | {"num_local_experts": 4, "num_experts_per_tok": 2,
                                  "layers_block_type": ["mamba", "attention"],
                                  "layer_types": ["mamba", "attention"],
                                  "shared_intermediate_size": 32},
    "jamba": {"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2,
              "attn_layer_offset": 1, "num_experts": 2, "expert_layer_period": 2,
              "expert_layer_offset": 1, "use_mamba_kernels": False},
    "qwen3_next": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16,
                             "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                             "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                             "layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip


@built_once
def mixture(kind: str, **settings) -> nn.Module:
    """A causal language model of this `model_type`, with weights large enough to matter."""
    torch.manual_seed(0)
    own = (MIXTURES | LINEAR_ROUTERS | STATE_SPACES).get(kind, {})
    chosen = SMALL | own | settings
    config = AutoConfig.for_model(kind, **chosen)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.12)
    return model
