"""A model that is converted to another dtype after injection, and injection in inference mode."""

import pytest
import torch
from models import llama, token_batches
from networks import Case

from lora_init import LoraConfig, LoraModel, get_peft_model

STARTS = {
    "pissa": ({}, {}),
    "kaiming": ({"modules_to_save": ["lm_head"]}, {}),
    "loftq": ({}, {"keep_original": True}),
    "dora": ({"use_dora": True, "init_lora_weights": "pissa"}, {}),
}
CONVERSIONS = ("half", "bfloat16", "double")
BOUNDS = {"half": 2e-2, "bfloat16": 0.1, "double": 3e-6}


def shaken(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def gap(found, wanted):
    return float((found.double() - wanted.double()).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("start", STARTS)
@torch.no_grad()
def test_every_state_follows_a_conversion(start, conversion, merged):
    settings, calls = STARTS[start]
    config = LoraConfig(
        **({"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": start} | settings)
    )
    base, batch, bound = llama(), token_batches(1)[0], BOUNDS[conversion]
    original = base(**batch).logits
    model = shaken(get_peft_model(base, config, **calls))
    wanted = model(**batch).logits
    if merged:
        model.merge_adapter()
    getattr(model, conversion)()
    if merged:
        assert gap(model(**batch).logits, wanted) < bound
        model.unmerge_adapter()
    assert gap(model(**batch).logits, wanted) < bound
    with model.disable_adapter():
        assert gap(model(**batch).logits, original) < bound
    assert gap(model(**batch).logits, wanted) < bound
    base = model.unload()
    assert gap(base(**batch).logits, original) < bound
    assert len({parameter.dtype for parameter in base.parameters()}) == 1


@pytest.mark.parametrize("method", ["pissa", "kaiming", "eva"])
def test_an_adapter_made_in_inference_mode_can_be_trained(method, tmp_path):
    case = Case()
    config = LoraConfig(r=4, target_modules=list(case.shapes), init_lora_weights=method)
    base = case.build()
    with torch.inference_mode():
        model = get_peft_model(base, config, calibration=case.calibration())
    model(case.inputs()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    base = case.build()
    with torch.inference_mode():
        loaded = LoraModel.from_pretrained(base, tmp_path)
        loaded.merge_adapter()
        loaded.unmerge_adapter()
    loaded(case.inputs()).square().sum().backward()
    with torch.inference_mode():
        merged = loaded.merge_and_unload()
    assert not any(parameter.is_inference() for parameter in merged.parameters())
