"""Fused experts of a model that is not loaded are read from a checkpoint, expert by expert."""

import copy

import pytest
import torch
from mixtures import mixture
from safetensors.torch import load_file, save_file

from lora_init import LoraConfig, get_peft_model
from lora_init.cli.parser import main
from lora_init.weights.checkpoint import OriginalWeights


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


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "granitemoehybrid"])
def test_single_experts_of_a_checkpoint_are_read_as_fused_ones(kind, tmp_path):
    """`save_pretrained` writes older names; `lora-init make` reads that folder."""
    loaded = mixture(kind)
    loaded.save_pretrained(tmp_path / "base")
    words = ["--method", "pissa", "-r", "2", "--target-modules", "q_proj", "--target-parameters"]
    router = "router.weight" if kind == "granitemoehybrid" else "gate.weight"
    names = f"experts.gate_up_proj,experts.down_proj,{router}"
    out = tmp_path / "made"
    assert main(["make", str(tmp_path / "base"), str(out), *words, names]) == 0
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights="pissa", target_modules=["q_proj"],
                        target_parameters=names.split(","), task_type="CAUSAL_LM")  # fmt: skip
    get_peft_model(loaded, config, cache=False).save_pretrained(tmp_path / "library")
    made, wanted = (load_file(folder / "adapter_model.safetensors")
                    for folder in (out, tmp_path / "library"))  # fmt: skip
    assert made.keys() == wanted.keys()
    # Stacks are decomposed from slices of a file, whose products may round differently.
    bound = 1e-5 if kind == "granitemoehybrid" else 0
    assert all(torch.allclose(made[key], wanted[key], rtol=0, atol=bound) for key in made)


def test_names_of_other_families_are_known():
    stored = {f"a.experts.{e}.{m}.weight": torch.full((2, 3), e + i / 10.0)
              for e in (0, 1) for i, m in enumerate(("fc1", "fc2", "fc3"))}  # fmt: skip
    stored |= {"b.experts.fc1.weight": torch.ones(4, 3, 2), "c.router.layer.weight": torch.eye(2)}
    weights = OriginalWeights(stored)
    gate_up = torch.cat([torch.full((2, 3), 1.0), torch.full((2, 3), 1.2)])
    assert torch.equal(weights.weight("a.experts.gate_up_proj", 1), gate_up)
    assert torch.equal(weights.weight("a.experts.down_proj", 1), torch.full((2, 3), 1.1))
    assert weights.shape("b.experts.gate_up_proj") == (4, 3, 2)
    assert weights.key("c.router") == "c.router.layer.weight"


def test_an_incomplete_set_of_experts_is_refused():
    stored = {f"mlp.experts.{expert}.down_proj.weight": torch.ones(3, 2) for expert in (0, 2)}
    with pytest.raises(ValueError, match="holds no weight for 'mlp.experts.down_proj'"):
        OriginalWeights(stored).shape("mlp.experts.down_proj")


def test_a_residual_base_of_experts_is_refused(tmp_path, capsys):
    mixture("mixtral").save_pretrained(tmp_path / "base")
    assert main(["make", str(tmp_path / "base"), str(tmp_path / "out"), "--residual"]) == 1
    assert "--no-experts" in capsys.readouterr().err
