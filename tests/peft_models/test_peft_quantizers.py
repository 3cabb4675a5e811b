"""Files and starts are exchanged with PEFT on layers of quantizers that PEFT supports."""

import importlib
import sys
import types

import peft
import pytest
import quantizers
import torch
from format_examples.packed_layers import quantized_layer
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn

from lora_init import (
    LoraConfig,
    LoraModel,
    get_peft_model,
    initialize_peft_model,
    restore_peft_model,
    save_peft_model,
)

# PEFT recognizes these by a package that is not installed, so its layers are named to it.
LAYERS = {
    "GPTQ act-order": GPTQLoraLinear,
    "AWQ": AwqLoraLinear,
    "AQLM": AqlmLoraLinear,
}
KINDS = ["torchao", "torchao dynamic", "torchao int4", "torchao float8", "HQQLinear", "QLinear",
         "QLinear float8", "compressed-tensors", "FP8Linear", "BitNet", "EETQ", "INC",
         *LAYERS]  # fmt: skip
OPAQUE = ("AQLM", "BitNet", "EETQ", "INC")
INC = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module", autouse=True)
def stand_ins():
    """PEFT's own dispatch for two packages that are not installed, to layers with their layout.

    PEFT defines these layers only if it finds the package, so its modules are loaded again.
    """
    reloaded = [importlib.import_module(f"peft.tuners.lora.{name}") for name in ("eetq", "inc")]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("eetq", INC):
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                parent = ".".join(parts[:end])
                patch.setitem(sys.modules, parent, types.ModuleType(parent))
        sys.modules["eetq"].EetqLinear = quantizers.EetqLinear
        sys.modules[INC].PatchedLinear = quantizers.PatchedLinear
        for name in ("is_eetq_available", "is_inc_available"):
            patch.setattr(f"peft.import_utils.{name}", lambda: True)
        for module in reloaded:
            importlib.reload(module)
        yield
    for module in reloaded:
        importlib.reload(module)


def base_model(kind):
    torch.manual_seed(0)
    module, columns = quantized_layer(kind)
    model = nn.Sequential(nn.Linear(16, columns), module, nn.GELU(), nn.Linear(32, 8))
    x = torch.randn(6, 16)
    if kind == "compressed-tensors":
        model(x)  # PEFT wraps these layers only after they have been decompressed
    return model.eval(), x


def peft_config(kind, model):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["1"])
    if kind in LAYERS:
        config._register_custom_module({type(model[1]): LAYERS[kind]})
    return config


def method(kind):
    return "eva" if kind in OPAQUE else "pissa"


def train(parameter):
    with torch.no_grad():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))


@every_kind
@torch.no_grad()
def test_peft_loads_our_file(kind, tmp_path):
    model, x = base_model(kind)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["1"], init_lora_weights=method(kind))
    ours = get_peft_model(model, config, calibration=[x] if kind in OPAQUE else None)
    train(ours.layers["1"].lora_B)
    ours.save_pretrained(tmp_path)
    model, _ = base_model(kind)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    if kind in LAYERS:
        config._register_custom_module({type(model[1]): LAYERS[kind]})
    theirs = peft.PeftModel.from_pretrained(model, tmp_path, config=config)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)


@every_kind
@torch.no_grad()
def test_we_load_pefts_file(kind, tmp_path):
    model, x = base_model(kind)
    theirs = peft.get_peft_model(model, peft_config(kind, model)).eval()
    train(theirs.base_model.model[1].lora_B["default"].weight)
    theirs.save_pretrained(tmp_path)
    ours = LoraModel.from_pretrained(base_model(kind)[0], tmp_path)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@every_kind
@torch.no_grad()
def test_a_live_model_of_peft_is_initialized_saved_and_restored(kind, tmp_path):
    model, x = base_model(kind)
    expected = base_model(kind)[0](x)
    theirs = peft.get_peft_model(model, peft_config(kind, model)).eval()
    data = [x] if kind in OPAQUE else None
    if kind in ("EETQ", "INC"):  # PEFT's own dispatch
        assert type(theirs.base_model.model[1]).__name__ == f"{kind.capitalize()}LoraLinear"
    initialize_peft_model(theirs, method(kind), calibration=data)
    torch.testing.assert_close(theirs(x), expected, rtol=1e-6, atol=1e-6)
    assert theirs.base_model.model[1].lora_A["default"].weight.any()
    train(theirs.base_model.model[1].lora_B["default"].weight)
    trained = theirs(x)
    if kind not in (*OPAQUE, "compressed-tensors"):  # which are kept, or edited
        with pytest.raises(ValueError, match="merging is not supported for layer '1'"):
            theirs.merge_adapter()
        assert torch.equal(theirs(x), trained)
    save_peft_model(theirs, tmp_path)
    ours = LoraModel.from_pretrained(base_model(kind)[0], tmp_path)
    torch.testing.assert_close(ours(x), trained, rtol=1e-5, atol=1e-5)
    restore_peft_model(theirs)
    with theirs.disable_adapter():
        torch.testing.assert_close(theirs(x), expected, rtol=1e-6, atol=1e-6)
