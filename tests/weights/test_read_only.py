"""Formats of quantizers whose packed weights are read, and never written."""

import pytest
import quantizers
import torch
from methods import SPECS
from models import Batches
from quantized_layers import LAYERS, quantized_layer
from torch import nn

from lora_init import LoraConfig, get_peft_model
from lora_init.support import support
from lora_init.weights.kinds import FORMATS, class_format, module_type

READ = [
    *((kind, {"bits": bits, "ordered": ordered}) for bits in (2, 3, 4, 8)
      for ordered in (True, False) for kind in ("QuantLinear", "TorchQuantLinear")),
    ("QuantLinear", {"groups": 1, "columns": 32, "dtype": torch.float16}),
    ("TritonV2QuantLinear", {"rows": 64, "columns": 32}),
    ("WQLinear_GEMM", {}),
    ("WQLinear_GEMM", {"group_size": 64, "dtype": torch.float16}),
    ("WQLinear_GEMM", {"rows": 64, "columns": 64}),
    ("WQLinear_GEMV", {}),
    ("WQLinear_GEMV", {"rows": 64, "columns": 64, "group_size": 16}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), READ)
def test_packed_integers_are_read_as_an_independent_dequantizer_reads_them(kind, settings):
    module = getattr(quantizers, kind)(**settings)
    one = class_format(module)
    assert torch.equal(one.read(module), module.original)
    assert one.shape(module) == tuple(module.original.shape)
    assert one.float_dtype(module) == module.scales.dtype
    assert ("act-order" in one.describe(module)) == (not settings.get("ordered", True))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("MarlinQuantLinear", "the marlin kernel stores its integers in another order"),
        ("WQLinear_Marlin", "the layout of a WQLinear_Marlin is not known"),
        ("WQLinear_GEMVFast", "the layout of a WQLinear_GEMVFast is not known"),
    ],
)
def test_kernels_that_reorder_integers_support_methods_that_read_no_weight(kind, reason):
    module = getattr(quantizers, kind)()
    assert reason in class_format(module).opaque(module)
    model, x = nn.Sequential(module), torch.randn(4, 64)
    with pytest.raises(TypeError, match=f"'0' is a {kind} .*cannot be read, because {reason}"):
        get_peft_model(model, LoraConfig(init_lora_weights="pissa", target_modules=["0"]))
    assert model[0] is module
    expected = model(x)
    config = LoraConfig(init_lora_weights="eva", r=4, target_modules=["0"])
    assert torch.equal(get_peft_model(model, config, calibration=[x])(x), expected)


READABLE = [kind for kind in LAYERS if FORMATS[kind.split(" ")[0]].readable]


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_layer_has_its_format_and_says_its_bits(kind):
    module, columns = quantized_layer(kind)
    one = class_format(module)
    assert one.name == module_type(module) == kind.split(" ")[0]
    assert one.quantized
    assert not one.writable
    assert one.shape(module)[1] == columns
    assert one.float_dtype(module) == torch.float32
    assert one.refusal(module) is one.unreadable(module) is None
    name = one.describe(module)
    assert any(word in name for word in ("8", "4", "3", "aqlm", "eetq", "bitnet"))
    for call in (
        lambda: one.write(module, torch.zeros(one.shape(module))),
        lambda: one.hold(module),
    ):
        with pytest.raises(TypeError, match="is not supported: its codes are read-only"):
            call()


@pytest.mark.parametrize("kind", READABLE)
@torch.no_grad()
def test_reading_gives_what_the_forward_multiplies_by(kind):
    module, columns = quantized_layer(kind)
    one = class_format(module)
    weight = one.read(module)
    assert weight.dtype == torch.float32
    assert tuple(weight.shape) == one.shape(module)
    x = torch.randn(16, columns, generator=torch.Generator().manual_seed(1))
    product = x.double() @ weight.double().T + module.bias
    rounds_inputs = "dynamic" in one.describe(module)
    error = torch.linalg.norm(module(x) - product) / torch.linalg.norm(product)
    assert error < (0.05 if rounds_inputs else 2e-6)


@torch.no_grad()
def test_a_tensor_without_a_dequantizer_is_read_through_its_kernel(monkeypatch):
    module, _ = quantized_layer("torchao")
    expected = class_format(module).read(module)
    monkeypatch.delattr(type(module.weight), "dequantize")
    torch.testing.assert_close(class_format(module).read(module), expected)


def test_a_layer_that_is_not_quantized_yet_is_refused():
    library = pytest.importorskip("hqq.core.quantize")
    model = nn.Sequential(library.HQQLinear(None, None, initialize=False))
    with pytest.raises(TypeError, match="'0' is an HQQLinear that is not quantized yet"):
        get_peft_model(model, LoraConfig(target_modules=["0"]))


ROUNDING = ("torchao dynamic", "compressed-tensors int8", "compressed-tensors float8")

METHODS = [
    pytest.param(method, kind)
    for method in ("kaiming", "pissa", "eva")
    for kind in LAYERS
    if support(SPECS[method], kind.split(" ")[0], "packed") is not None
]


@pytest.mark.parametrize(("method", "kind"), METHODS)
def test_start_training_file_and_removal_of_an_adapter(method, kind, tmp_path):
    module, columns = quantized_layer(kind)
    torch.manual_seed(0)
    first, last = nn.Linear(16, columns), nn.Linear(32, 8)
    model, x = nn.Sequential(first, module, nn.GELU(), last).eval(), torch.randn(6, 16)
    config = LoraConfig(r=4, target_modules=["1"], init_lora_weights=method)
    adapted = get_peft_model(model, config, calibration=Batches([x]) if method == "eva" else None)
    layer = adapted.layers["1"]
    assert layer.base_state == ("in_forward" if method == "pissa" else "kept")
    name = class_format(quantized_layer(kind)[0]).describe(quantized_layer(kind)[0])
    assert name in str(adapted.plan)
    (row,) = adapted.init_report().layers
    assert (row.relative_norm is None) == (not FORMATS[kind.split(" ")[0]].readable)
    with torch.no_grad():
        with adapted.disable_adapter():
            expected = adapted(x)
        torch.testing.assert_close(adapted(x), expected, rtol=1e-6, atol=1e-6)
    inner = x.clone().requires_grad_()
    adapted(inner).square().sum().backward()
    # A package that rounds the inputs of its layer lets no gradient through it on a CPU.
    assert inner.grad.any() == (kind not in ROUNDING)
    assert layer.lora_B.grad.any()
    with torch.no_grad():
        layer.lora_B += 0.1 * torch.randn(layer.lora_B.shape)
        trained = adapted(x)
    adapted.save_pretrained(tmp_path)
    if not class_format(module).writable:
        for merge in (adapted.merge_adapter, adapted.merge_and_unload):
            with pytest.raises(ValueError, match="merging is not supported for layer '1'"):
                merge()
        assert torch.equal(adapted(x), trained)
    base = adapted.unload()
    assert base[1] is module
    with torch.no_grad():
        assert torch.equal(base(x), expected)
        loaded = type(adapted).from_pretrained(base, tmp_path)
        torch.testing.assert_close(loaded(x), trained, rtol=1e-6, atol=1e-6)
