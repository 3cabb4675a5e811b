"""Our starts on adapters that diffusers' `add_adapter` makes, and diffusers' own functions then."""

import copy

import peft
import pytest
import torch
from measures import assert_gap, train

pytest.importorskip("diffusers")
from diffusion import COMPONENTS, MODELS, TARGETS, output

from lora_init import LoraConfig, get_peft_model, initialize_peft_model
from lora_init.peft_models.layers import adapted_layers
from lora_init.peft_models.start import records

pytestmark = pytest.mark.sampled(3)

KINDS = list(MODELS)
EXACT = 4e-6


def adapted(kind, method="pissa", *, dtype=torch.float32, **settings):
    """A tiny model of diffusers with an initialized adapter, and its base."""
    base = MODELS[kind]().to(dtype)
    model = copy.deepcopy(base)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[kind]} | settings
    model.add_adapter(peft.LoraConfig(**settings))
    initialize_peft_model(model, method)
    return model, base


def saved_and_loaded(model, base, folder):
    """diffusers' own file, loaded into the base by diffusers."""
    model.save_lora_adapter(folder)
    loaded = copy.deepcopy(base)
    loaded.load_lora_adapter(folder, prefix=None, use_safetensors=True, adapter_name="default")
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_the_factors_are_ours_and_diffusers_saves_them(kind, tmp_path):
    model, base = adapted(kind)
    expected = output(base, kind)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[kind], init_lora_weights="pissa")
    ours = get_peft_model(copy.deepcopy(base), config)
    layers = adapted_layers(model, "default")
    assert [layer.name for layer in layers] == list(ours.layers)
    for layer in layers:
        assert torch.equal(layer.matrix("lora_A"), ours.layers[layer.name].lora_A)
        assert torch.equal(layer.matrix("lora_B"), ours.layers[layer.name].lora_B)
    assert_gap(output(model, kind), expected, EXACT)
    loaded = saved_and_loaded(train(model), base, tmp_path)
    assert_gap(output(loaded, kind), output(model, kind), EXACT)
    assert loaded.peft_config["default"].r == 8
    model.disable_lora()
    assert_gap(output(model, kind), expected, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_scale_the_whole_change(dtype, tmp_path):
    """A weight c gives W + c s (B A - B0 A0), as for the saved adapter on the original base."""
    model, base = adapted("flux", dtype=dtype)
    assert {layer.start.base for layer in adapted_layers(model, "default")} == {
        "edited" if dtype is torch.float32 else "in_forward"
    }
    tolerance = EXACT if dtype is torch.float32 else 0.02
    loaded = saved_and_loaded(train(model, 0.3), base, tmp_path)
    for weight in (0.5, 0.0, 2.0, 1.0):
        for one in (model, loaded):
            one.set_adapters("default", weight)
        assert_gap(output(model, "flux"), output(loaded, "flux"), tolerance)
    before = output(model, "flux")
    loaded.set_adapters("default", 0.5)
    half = output(loaded, "flux")
    model.fuse_lora(lora_scale=0.5)
    assert_gap(output(model, "flux"), half, tolerance)
    model.unfuse_lora()
    model.set_adapters("default", 1.0)
    assert_gap(output(model, "flux"), before, tolerance)


def test_weights_that_would_be_wrong_are_refused():
    model, _ = adapted("flux", use_dora=True)
    model.set_adapters("default", 0.5)
    with pytest.raises(ValueError, match="weight of 0.5 is not supported with use_dora=True"):
        output(model, "flux")


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unloading_keeps_what_was_fused_and_else_the_base(merged, dtype):
    model, base = adapted("flux", dtype=dtype)
    before = output(train(model, 0.3), "flux")
    if merged:
        model.fuse_lora()
    model.unload_lora()
    tolerance = EXACT if dtype is torch.float32 else 0.02
    assert_gap(output(model, "flux"), before if merged else output(base, "flux"), tolerance)
    assert not records(model)
    assert type(model.proj_out) is torch.nn.Linear
    assert not model.proj_out._forward_hooks
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS["flux"]))
    present = output(model, "flux")
    initialize_peft_model(model, "olora")
    assert_gap(output(model, "flux"), present, tolerance)


@pytest.mark.parametrize("method", ["pissa", "orthogonal"])
def test_a_removed_adapter_leaves_the_base(method):
    model, base = adapted("flux", method)
    train(model).delete_adapters("default")
    assert_gap(output(model, "flux"), output(base, "flux"), EXACT)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS["flux"]))
    initialize_peft_model(model, "pissa")
    model.unload_lora()
    assert_gap(output(model, "flux"), output(base, "flux"), EXACT)


def test_another_adapter_is_refused_on_a_changed_base(tmp_path):
    model, base = adapted("flux")
    saved_and_loaded(model, base, tmp_path)
    before = output(model, "flux")
    for hotswap in (False, True):
        with pytest.raises(ValueError, match="load_lora_adapter is not supported"):
            model.load_lora_adapter(tmp_path, prefix=None, hotswap=hotswap)
    with pytest.raises(ValueError, match="add_adapter is not supported"):
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"]), "other")
    assert torch.equal(output(model, "flux"), before)


def test_a_replaced_base_has_no_file_of_diffusers(tmp_path):
    model, _ = adapted("flux", "loftq")
    with pytest.raises(ValueError, match="save_peft_model"):
        model.save_lora_adapter(tmp_path)


@pytest.mark.exhaustive  # diffusers needs half a minute to import its pipelines
@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_save_and_load_the_adapter(kind, tmp_path):
    from diffusers.loaders import lora_pipeline

    loaders = {"unet": "StableDiffusion", "flux": "Flux", "video": "Wan"}
    loader, part = getattr(lora_pipeline, f"{loaders[kind]}LoraLoaderMixin"), COMPONENTS[kind]
    model, base = adapted(kind)
    train(model)
    loader.save_lora_weights(
        tmp_path,
        **{
            f"{part}_lora_layers": peft.get_peft_model_state_dict(model),
            f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict(),
        },
    )
    found = loader.lora_state_dict(tmp_path, return_lora_metadata=True)
    state, metadata, loaded = found[0], found[-1], copy.deepcopy(base)
    alphas = {"network_alphas": None} if kind != "video" else {}
    into = getattr(loader, f"load_lora_into_{part}")
    into(state, **{part: loaded}, metadata=metadata, **alphas)
    assert_gap(output(loaded, kind), output(model, kind), EXACT)
