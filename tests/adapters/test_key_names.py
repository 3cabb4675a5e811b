"""Keys that spell a module's name differently: mapped to one module each, or refused by name."""

import copy
import json
import re

import peft
import pytest
import torch
from measures import assert_gap, assert_unchanged, largest_ratio, logits, snapshot, train
from models import bert, gpt2, llama, token_batches
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from lora_init import LoraConfig, LoraModel, get_peft_model

pytestmark = pytest.mark.sampled(3)

WEIGHTS = "adapter_model.safetensors"


def rewrite(folder, rename):
    """Rename the keys of a file of PEFT."""
    tensors = {rename(key): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def peft_adapter(make, folder, batches=token_batches, **settings):
    model = train(peft.get_peft_model(make(), peft.LoraConfig(r=2, **settings)))
    expected = logits(model, batches())
    model.save_pretrained(folder)
    return model, expected


PREFIX = "base_model.model."
RENAMES = {
    "compiled": lambda key: key.replace(PREFIX, PREFIX + "_orig_mod."),
    "a compiled PeftModel": lambda key: "_orig_mod." + key,
    "DistributedDataParallel": lambda key: "module." + key,
    "both": lambda key: "module._orig_mod." + key,
    "compiled blocks": lambda key: re.sub(r"layers\.(\d+)\.", r"layers.\1._orig_mod.", key),
    "checkpointed blocks": lambda key: re.sub(
        r"layers\.(\d+)\.", r"layers.\1._checkpoint_wrapped_module.", key
    ),
    "an adapter's name": lambda key: re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", key),
    "another adapter's name": lambda key: re.sub(r"(lora_[AB])\.weight", r"\1.mine.weight", key),
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "the backbone alone": lambda key: key.replace(PREFIX + "model.", PREFIX),
    "inside another model": lambda key: key.replace(PREFIX, PREFIX + "text.inner."),
}


@pytest.mark.filterwarnings("ignore:the adapter's layers are called")
@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_a_file_with_other_names_loads(rename, tmp_path):
    settings = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}}
    _, expected = peft_adapter(llama, tmp_path, target_modules=["q_proj", "v_proj"], **settings)
    rewrite(tmp_path, rename)
    loaded = LoraModel.from_pretrained(llama(), tmp_path)
    assert_gap(logits(loaded, token_batches()), expected, 1e-6)
    loaded.save_pretrained(tmp_path / "again")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "again")
    assert_gap(logits(theirs, token_batches()), expected, 1e-6)


def test_another_leading_part_gives_a_warning(tmp_path):
    peft_adapter(llama, tmp_path, target_modules=["q_proj"])
    rewrite(tmp_path, RENAMES["the backbone alone"])
    with pytest.warns(UserWarning, match="are called '…' in the file and 'model.…' in Llama"):
        LoraModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"bias": "all"}], ids=str)
def test_the_whole_state_dict_of_a_peft_model_loads(settings, tmp_path):
    model, expected = peft_adapter(
        bert, tmp_path, target_modules=["query", "word_embeddings"], task_type="SEQ_CLS", **settings
    )
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded = LoraModel.from_pretrained(bert(), tmp_path)
    assert_gap(logits(loaded, token_batches()), expected, 1e-6)


def test_several_adapters_in_one_file_are_named(tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    state = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="several adapters: 'default', 'other'"):
        LoraModel.from_pretrained(llama(), tmp_path)


# -- former names of transformers' modules -----------------------------------------------------


def llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=96, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)
    return LlavaForConditionalGeneration(config).eval()


def qwen2_vl():
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 96,
            "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16},
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config).eval()


FORMER = {
    "llava 4.40": (
        llava,
        [
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower.vision_model."),
        ],
    ),
    "llava, the text alone": (llava, [("model.language_model.", "model.language_model.model.")]),
    "qwen2_vl 4.45": (
        qwen2_vl, [("model.language_model.", "model."), ("model.visual.", "visual.")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "renames"), FORMER.values(), ids=FORMER)
def test_former_names_of_vision_language_models_are_mapped(make, renames, tmp_path):
    model, _ = peft_adapter(make, tmp_path, lambda: [], target_modules=["q_proj", "v_proj", "qkv"])
    expected = {
        key: value for key, value in model.state_dict().items() if key.endswith("default.weight")
    }

    def former(key):
        for new, old in renames:
            if key.startswith(PREFIX + new):
                return PREFIX + old + key.removeprefix(PREFIX + new)
        return key

    rewrite(tmp_path, former)
    loaded = LoraModel.from_pretrained(make(), tmp_path)
    assert 2 * len(loaded.layers) == len(expected)
    for name, layer in loaded.layers.items():
        for part in ("lora_A", "lora_B"):
            wanted = expected[f"{PREFIX}{name}.{part}.default.weight"]
            assert torch.equal(getattr(layer, part), wanted)


# -- what cannot be mapped ---------------------------------------------------------------------


class Pair(nn.Module):
    """Two equal towers: a key without the tower's name is ambiguous."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (
            nn.ModuleDict({"up": nn.Linear(4, 4)}),
            nn.ModuleDict({"up": nn.Linear(4, 4)}),
        )


UNKNOWN = {
    "of another model": (llama, lambda key: key.replace("layers.1", "layers.7"), "layers.7"),
    "a part of a name": (
        llama, lambda key: key.replace("self_attn", "attn"), "model.layers.0.attn.q_proj'",
    ),
    "ambiguous": (Pair, lambda key: PREFIX + key.partition("left.")[2], "a layer 'up'"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "rename", "named"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_cannot_be_mapped_is_named_in_full(make, rename, named, tmp_path):
    targets = ["left.up"] if make is Pair else ["q_proj"]
    peft_adapter(make, tmp_path, lambda: [], target_modules=targets)
    rewrite(tmp_path, rename)
    base = make()
    before = snapshot(base)
    with pytest.raises(ValueError, match="which .* does not have") as caught:
        LoraModel.from_pretrained(base, tmp_path)
    assert named in str(caught.value)
    assert_unchanged(base, before)


# -- a compiled base ---------------------------------------------------------------------------


def compiled(make):
    return torch.compile(make(), backend="eager")


def compiled_blocks(make):
    model = make()
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    return model


@pytest.mark.parametrize("method", ["pissa", "loftq"])
@pytest.mark.parametrize("wrap", [compiled, compiled_blocks])
def test_a_compiled_base_and_a_plain_one_exchange_files(wrap, method, tmp_path):
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=method,
        rank_pattern={"q_proj": 3}, modules_to_save=["norm"],
    )  # fmt: skip
    wrapped_model = train(get_peft_model(wrap(llama), config))
    plain_model = train(get_peft_model(llama(), copy.deepcopy(config)))
    for model, other in ((wrapped_model, llama()), (plain_model, wrap(llama))):
        folder = tmp_path / type(other).__name__
        model.save_pretrained(folder)
        files = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
        assert not any("_orig_mod" in key for key in load_file(files[0]))
        assert "_orig_mod" not in json.loads((folder / "adapter_config.json").read_text())
        loaded = LoraModel.from_pretrained(other, folder)
        plain = {name.replace("_orig_mod.", ""): layer for name, layer in loaded.layers.items()}
        for name, layer in model.layers.items():
            found = plain[name.replace("_orig_mod.", "")]
            assert torch.equal(found.lora_A, layer.lora_A)
            assert torch.equal(found.lora_B, layer.lora_B)
            assert (found.rank, found.scaling) == (layer.rank, layer.scaling)


def test_peft_loads_what_a_compiled_base_wrote(tmp_path):
    config = LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights="pissa")
    plain = train(get_peft_model(gpt2(), config))
    expected = logits(plain, token_batches())
    train(get_peft_model(compiled(gpt2), config)).save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path)
    assert_gap(logits(theirs, token_batches()), expected, 1e-5 * largest_ratio(plain, gpt2()))
