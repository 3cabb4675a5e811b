"""`initialize_peft_model` on PEFT's wrappers of fused experts (`target_parameters`)."""

import copy

import peft
import pytest
import torch
from mixtures import mixture
from models import token_batches
from peft import PeftModel

from lora_init import (
    LoraConfig,
    LoraModel,
    get_peft_model,
    initialize_peft_model,
    load_peft_checkpoint,
    restore_peft_model,
)
from lora_init.peft_models.layers import adapted_layers
from lora_init.registry import get_initializer

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def parameters(kind):
    """The weights of a model's experts and routers."""
    return [*EXPERTS, "router.weight" if kind == "gpt_oss" else "gate.weight"]


def wrapped(kind="mixtral", dtype=torch.float32, r=3, names=None, **settings):
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj"],
                             target_parameters=names or parameters(kind), **settings)  # fmt: skip
    return peft.get_peft_model(mixture(kind).to(dtype), config).eval()


@torch.no_grad()
def output(model):
    (batch,) = token_batches(1, padded=False)
    return model(input_ids=batch["input_ids"]).logits.double()


def gap(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@torch.no_grad()
def moved(model):
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("mixtral", "pissa"), ("gpt_oss", "milora"), ("qwen3_moe", "eva"), ("gpt_oss", "lora_da"),
        ("mixtral", "lora_da_frozen"),
    ],
)  # fmt: skip
def test_the_start_is_that_of_get_peft_model(kind, method):
    spec = get_initializer(method)
    names = EXPERTS if "output_moments" in spec.reads else parameters(kind)
    calibration = token_batches(2) if spec.needs_data else None
    model, base = wrapped(kind, names=names), mixture(kind)
    before = output(base)
    report = initialize_peft_model(model, method, calibration=calibration, cache=False)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"],
                        target_parameters=names, init_lora_weights=method)  # fmt: skip
    ours = get_peft_model(base, config, calibration=calibration, cache=False).eval()
    assert (gap(output(model), before) < 2e-6) == spec.preserves_output
    assert sorted(row.name for row in report.layers) == sorted(ours.layers)
    rows = {row.name: row for row in ours.init_report().layers}
    for row in report.layers:
        assert row.norm_A == pytest.approx(rows[row.name].norm_A, rel=1e-6)
    for layer in adapted_layers(model, "default"):
        for which in ("lora_A", "lora_B"):
            assert torch.equal(layer.matrix(which), getattr(ours.layers[layer.name], which))
    with torch.no_grad():
        for parameter in [p for one in (model, ours) for p in one.parameters() if p.requires_grad]:
            parameter.mul_(1.5)
    assert gap(output(model), output(ours)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_out_of_a_subtracting_start(dtype, tmp_path):
    model, base = wrapped(dtype=dtype), mixture("mixtral").to(dtype)
    before, exact = output(base), 5e-6 if dtype is torch.float32 else 0.03
    initialize_peft_model(model, "pissa", cache=False)
    assert gap(output(model), before) < exact
    trained = output(moved(model))
    assert gap(trained, before) > 2 * exact
    with model.disable_adapter():
        assert gap(output(model), before) < 1e-6
    model.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).r == 6
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert gap(output(theirs), trained) < exact
    ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert gap(output(ours), trained) < exact
    again = wrapped(dtype=dtype)
    load_peft_checkpoint(again, tmp_path)
    assert gap(output(again), trained) < exact
    again.load_state_dict(model.state_dict())
    assert gap(output(again), trained) < exact
    restore_peft_model(again)
    assert gap(output(again), before) < 1e-6
    model.merge_adapter()
    assert gap(output(model), trained) < exact
    model.unmerge_adapter()
    assert gap(output(model), trained) < exact
    # By now a 16-bit weight was rounded three times.
    assert gap(output(model.merge_and_unload()), trained) < 3 * exact


def test_what_peft_cannot_hold_is_refused():
    with pytest.raises(
        ValueError, match="'loftq' is not supported .* replaces the weights of a par"
    ):
        initialize_peft_model(wrapped(), "loftq")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["k_proj.weight"])
    model = peft.get_peft_model(mixture("mixtral"), config)
    with pytest.raises(TypeError, match="the weight of a Linear in PEFT's ParamWrapper, which is"):
        initialize_peft_model(model, "pissa")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    model = peft.get_peft_model(mixture("llama4_text"), config)
    with pytest.raises(TypeError, match="stored as .in, out., but PEFT's factors of a Llama4TextE"):
        initialize_peft_model(model, "pissa")
    model = wrapped()
    initialize_peft_model(model, "pissa", cache=False)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="several active adapters .* Activate one adapter"):
        output(model)
