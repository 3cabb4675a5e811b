"""Default target modules by architecture: `model.config.model_type` -> module names.

The defaults are PEFT's, so `target_modules=None` selects the same layers in both libraries.
"""

from __future__ import annotations

_BY_TARGETS: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral "
    "opt qwen2 qwen3 stablelm",
    ("query", "value"): "bert electra layoutlm roberta xlm-roberta",
    ("query_key_value",): "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox",
    ("q", "v"): "mt5 t5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("c_proj", "c_attn"): "btlm",
    ("qkv_proj",): "codegen",
    ("in_proj",): "deberta",
    ("query_proj", "value_proj"): "deberta-v2",
    ("Wqkv",): "mpt",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}

DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **{kind: list(names) for names, kinds in _BY_TARGETS.items() for kind in kinds.split()},
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}
