"""Save adapters in the format of diffusers, and load files of diffusers."""

import copy

import pytest
import torch
from measures import assert_gap, train
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("diffusers")
from diffusion import COMPONENTS, MODELS, TARGETS, output

from lora_init import LoraConfig, LoraModel, get_peft_model
from lora_init.adapters.diffusers_format import DIFFUSERS_NAME

pytestmark = pytest.mark.sampled(3)

EXACT = 4e-6


def trained(kind, method="pissa", **settings):
    """A trained adapter on a tiny model of diffusers, and its base."""
    base = MODELS[kind]()
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[kind]} | settings
    config = LoraConfig(init_lora_weights=method, **settings)
    return train(get_peft_model(copy.deepcopy(base), config)).eval(), base


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("unet", {"use_rslora": True}),
        ("flux", {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"proj_out": 3}}),
        ("video", {"init_lora_weights": "orthogonal"}),
    ],
)
def test_diffusers_and_we_load_our_file(kind, settings, tmp_path):
    settings = dict(settings)
    model, base = trained(kind, settings.pop("init_lora_weights", "pissa"), **settings)
    model.save_pretrained(tmp_path, format="diffusers")
    assert [path.name for path in tmp_path.iterdir()] == [DIFFUSERS_NAME]
    expected, loaded = output(model, kind), copy.deepcopy(base)
    loaded.load_lora_adapter(tmp_path, prefix=COMPONENTS[kind], use_safetensors=True)
    assert_gap(output(loaded, kind), expected, EXACT)
    ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_gap(output(ours, kind), expected, EXACT)


def test_files_of_save_lora_adapter_and_older_ones_are_loaded(tmp_path):
    model, base = trained("flux", rank_pattern={"to_q": 2})
    expected = output(model, "flux")
    model.save_pretrained(tmp_path / "ours", format="diffusers")
    theirs = copy.deepcopy(base)
    theirs.load_lora_adapter(tmp_path / "ours", use_safetensors=True, adapter_name="default")
    theirs.set_adapters("default", 1.0)
    theirs.save_lora_adapter(tmp_path / "theirs")  # with a configuration, without a component
    tensors = load_file(tmp_path / "ours" / DIFFUSERS_NAME)
    older = {}
    for key, value in tensors.items():
        key = key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        older[key] = value / 2 if ".up." in key else value
        older[key.partition(".lora.")[0] + ".alpha"] = torch.tensor(16.0)  # twice the rank
    older["text_encoder.q_proj.lora.down.weight"] = torch.zeros(2, 2)
    (tmp_path / "older").mkdir()
    save_file(older, tmp_path / "older" / DIFFUSERS_NAME)
    for folder in ("theirs", "older"):
        loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        assert_gap(output(loaded, "flux"), expected, EXACT)


@pytest.mark.parametrize(
    ("key", "phrase"),
    [
        ("lora_unet_down_blocks_0.lora_down.weight", "kohya's scripts"),
        ("transformer.blocks.0.processor.to_q_lora.down.weight", "load_lora_weights"),
        ("transformer.single_blocks.0.linear.lora_A.weight", "does not have"),
    ],
)
def test_files_of_other_programs_are_refused(key, phrase, tmp_path):
    save_file({key: torch.ones(2, 4)}, tmp_path / DIFFUSERS_NAME)
    with pytest.raises(ValueError, match=phrase):
        LoraModel.from_pretrained(MODELS["flux"](), tmp_path)


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"init_lora_weights": "loftq"}, "quantized base"),
    ],
)
def test_an_adapter_that_diffusers_cannot_load_is_refused(settings, phrase, tmp_path):
    method = settings.pop("init_lora_weights", "orthogonal")
    model, _ = trained("flux", method, **settings)
    with pytest.raises(ValueError, match=phrase):
        model.save_pretrained(tmp_path, format="diffusers")
    assert not list(tmp_path.iterdir())


def test_settings_are_checked(tmp_path):
    base = nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    for settings, phrase in [
        ({"format": "kohya"}, "must be one of 'peft', 'diffusers'"),
        ({"format": "diffusers", "portable": True}, "Leave out one of them"),
        ({"component": "unet"}, "add format='diffusers'"),
        ({"format": "diffusers"}, "has a dilation"),
    ]:
        with pytest.raises(ValueError, match=phrase):
            model.save_pretrained(tmp_path, **settings)
