"""Fused experts of a model that is not loaded are read from a checkpoint, expert by expert."""

import copy
import json

import pytest
import torch
from mixtures import SMALL, mixture
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lora_init import LoraConfig, get_peft_model
from lora_init.cli.checkpoints import loaded as load_checkpoint
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


def packed_checkpoint(folder):
    """A gpt-oss checkpoint with MXFP4 experts, and the model that it means, in bfloat16."""
    values = SMALL | {"intermediate_size": 64, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("gpt_oss", **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = state.pop(name).shape
        codes = torch.randint(
            0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator
        )
        scales = torch.randint(
            118, 124, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator
        )
        state |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        values = convert_moe_packed_tensors(codes, scales, dtype=torch.bfloat16)
        model.get_parameter(name).data.copy_(values)
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    stored = config.to_dict() | {
        "architectures": ["GptOssForCausalLM"], "dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(stored))
    return model


def test_experts_in_mxfp4_are_read_as_transformers_dequantizes_them(tmp_path):
    model = packed_checkpoint(tmp_path / "base")
    stored = OriginalWeights(tmp_path / "base")
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{name}"
            wanted = model.get_parameter(name)
            assert stored.shape(name) == tuple(wanted.shape)
            assert torch.equal(stored.weight(name), wanted)
            assert torch.equal(stored.weight(f"base_model.{name}", 2), wanted[2])
    assert "experts" not in stored.key("model.layers.0.self_attn.q_proj")
    read = load_checkpoint(tmp_path / "base", "cpu", None).state_dict()
    assert all(torch.equal(read[key], value) for key, value in model.state_dict().items())


def test_make_reads_a_checkpoint_in_mxfp4(tmp_path):
    model = packed_checkpoint(tmp_path / "base")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    words = ["--method", "pissa", "-r", "2", "--target-modules", "q_proj"]
    words += ["--target-parameters", ",".join(names)]
    assert main(["make", str(tmp_path / "base"), str(tmp_path / "made"), *words]) == 0
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights="pissa", target_modules=["q_proj"],
                        target_parameters=names, task_type="CAUSAL_LM")  # fmt: skip
    get_peft_model(model, config, cache=False).save_pretrained(tmp_path / "library")
    made, wanted = (load_file(tmp_path / folder / "adapter_model.safetensors")
                    for folder in ("made", "library"))  # fmt: skip
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[key], wanted[key]) for key in made)
