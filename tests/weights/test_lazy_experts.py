"""Fused experts of a model that is not loaded are read from a checkpoint, expert by expert."""

import copy

import pytest
import torch
from mixtures import mixture
from safetensors.torch import save_file

from lora_init import LoraConfig, get_peft_model


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_of_an_unloaded_model_are_read_from_a_checkpoint(kind, tmp_path):
    loaded = mixture(kind)
    state = {key: value.clone() for key, value in loaded.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    config = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"],
                        target_parameters=["experts.gate_up_proj", "down_proj"])  # fmt: skip
    empty = copy.deepcopy(loaded).to("meta")
    with pytest.raises(ValueError, match="pass original_weights"):
        get_peft_model(empty, config)
    lazy = get_peft_model(empty, config, original_weights=tmp_path, cache=False)
    for name, layer in get_peft_model(loaded, config, cache=False).layers.items():
        assert torch.equal(lazy.layers[name].lora_A, layer.lora_A), name
        assert lazy.layers[name].stored_weight.is_meta
