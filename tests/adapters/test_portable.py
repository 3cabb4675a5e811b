"""One file, three loaders: PEFT, vLLM and llama.cpp scale a portable adapter alike."""

import json
import math
import warnings

import peft
import pytest
import torch
from measures import assert_gap, largest_ratio, logits, train
from models import bert, gpt2, llama, token_batches
from safetensors.torch import load_file
from torch import nn

from lora_init import LoraConfig, LoraModel, get_peft_model

pytestmark = pytest.mark.sampled(3)

SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 6}},
    "alphas": {"alpha_pattern": {"v_proj": 1.5}, "use_rslora": True},
    "ranks and alphas": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"q_proj": 3}},
}


def vllm_scaling(config, tensor_rank):
    """vLLM's PEFTHelper: one number for all layers; patterns are not read."""
    root = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    return config["lora_alpha"] / root


def llama_cpp_scaling(config, tensor_rank):
    """llama.cpp's get_scale: the file's alpha over the rank of the tensor."""
    return config["lora_alpha"] / tensor_rank


def peft_scaling(config, tensor_rank):
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    return vllm_scaling(config, tensor_rank)


@torch.no_grad()
def merged_by(scaling, base, folder):
    """The base with W + scaling · B A, computed from the folder's files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, lora_A in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            lora_B = tensors[key.replace("lora_A", "lora_B")]
            weight = base.get_submodule(name).weight
            weight += (scaling(config, len(lora_A)) * lora_B @ lora_A).to(weight)
    return base


def adapted(method, **settings):
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=method, **settings,
    )  # fmt: skip
    calibration = token_batches() if config.initializer()[0].needs_data else None
    return train(get_peft_model(llama(), config, calibration=calibration))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("method", ["pissa", "eva"])
def test_all_loaders_compute_the_same(method, settings, tmp_path):
    model = adapted(method, **settings)
    expected = logits(model, token_batches())
    tolerance = 1e-5 * largest_ratio(model, llama()) if method == "pissa" else 2e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, portable=True)
    for scaling in (vllm_scaling, llama_cpp_scaling, peft_scaling):
        merged = merged_by(scaling, llama(), tmp_path)
        assert_gap(logits(merged, token_batches()), expected, tolerance)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert_gap(logits(theirs, token_batches()), expected, tolerance)
    ours = LoraModel.from_pretrained(llama(), tmp_path)
    assert_gap(logits(ours, token_batches()), expected, tolerance)
    ranks = {layer.rank for layer in ours.layers.values()}
    assert len(ranks) == 1
    ours.save_pretrained(tmp_path / "again", portable=True)
    first = load_file(tmp_path / "adapter_model.safetensors")
    second = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_scaling_of_16_bit_factors_is_not_rounded(tmp_path):
    config = LoraConfig(r=4, lora_alpha=11, target_modules=["q_proj"])
    model = train(get_peft_model(llama(), config, adapter_dtype=torch.bfloat16))
    model.save_pretrained(tmp_path, portable=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in model.layers.items():
        lora_B = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert torch.equal(lora_B, layer.lora_B.detach().float() * (11 / 4))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, x):
        return self.conv(x)


REFUSED = {
    "use_dora=True": (llama, {"target_modules": ["q_proj"], "use_dora": True}),
    "lora_bias=True": (bert, {"target_modules": ["query"], "lora_bias": True}),
    "bias='all'": (bert, {"target_modules": ["query"], "bias": "all"}),
    "bias='lora_only'": (bert, {"target_modules": ["query"], "bias": "lora_only"}),
    "modules_to_save": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "replaced base": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "loftq"}),
    "the Conv1D 'transformer.h.0.attn.c_attn'": (gpt2, {"target_modules": ["c_attn"]}),
    "the Embedding 'model.embed_tokens'": (llama, {"target_modules": ["embed_tokens"]}),
    "the Conv2d 'conv'": (Convolutions, {"target_modules": ["conv"]}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_loader_cannot_read_is_refused_before_anything_is_written(message, tmp_path):
    make, settings = REFUSED[message]
    model = get_peft_model(make(), LoraConfig(r=2, **settings))
    with pytest.raises(ValueError, match=f"portable=True is not supported with .*{message}"):
        model.save_pretrained(tmp_path / "folder", portable=True)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("method", ["kaiming", "pissa"])
def test_peft_adapts_the_dense_layers_whose_names_it_takes_for_experts(method, tmp_path):
    def base():
        model = llama()
        model.config.model_type = "deepseek_v3"  # whose names PEFT maps
        return model

    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=method)
    model = get_peft_model(base(), config)
    with torch.no_grad():
        for layer in model.layers.values():
            layer.lora_B.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    ours, theirs = logits(model, token_batches()), logits(loaded, token_batches())
    gap = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
    assert gap < 1e-5


@pytest.mark.parametrize(
    ("settings", "loaders"),
    [
        ({}, ()),
        ({"rank_pattern": {"q_proj": 2}}, ("vLLM",)),
        ({"alpha_pattern": {"q_proj": 3}}, ("vLLM", "llama.cpp")),
        ({"use_rslora": True}, ("llama.cpp",)),
        # One rank for every layer: the pattern changes nothing in any loader.
        ({"rank_pattern": {".*": 4}}, ()),
    ],
    ids=["plain", "ranks", "alphas", "rslora", "one rank"],
)
def test_a_plain_file_that_others_scale_differently_says_which(settings, loaders, tmp_path):
    model = adapted("pissa", **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path)
    said = "".join(str(warning.message) for warning in caught)
    assert all((loader in said) == (loader in loaders) for loader in ("vLLM", "llama.cpp"))
    for loader, scaling in (("vLLM", vllm_scaling), ("llama.cpp", llama_cpp_scaling)):
        merged = logits(merged_by(scaling, llama(), tmp_path), token_batches())
        gap = max(float((a - b).norm() / b.norm())
                  for a, b in zip(merged, logits(model, token_batches()), strict=True))  # fmt: skip
        assert (gap > 1e-3) == (loader in loaders)
