"""Formats of quantizers whose packed weights are read, and never written."""

from contextlib import nullcontext

import pytest
import quantizers
import torch
from format_examples.packed_layers import LAYERS, quantized_layer
from methods import REPLACING, SPECS
from models import Batches
from torch import nn

from lora_init import LoraConfig, calibrate, get_peft_model
from lora_init.cli.support import support
from lora_init.weights.kinds import FORMATS, class_format, module_type
from lora_init.weights.read_only import ReadOnlyFormat

pytestmark = pytest.mark.sampled(3)

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


def stored_in_float8(module):
    """Cast the weight for each forward pass, as diffusers' layerwise casting does."""

    def widen(module, args):
        module.weight.data = module.weight.data.float()

    def narrow(module, args, output):
        module.weight.data = module.weight.data.to(torch.float8_e4m3fn)

    narrow(module, None, None)
    module.register_forward_pre_hook(widen)
    module.register_forward_hook(narrow)
    return module


@pytest.mark.parametrize("method", ["kaiming", "pissa", "eva"])
def test_a_weight_that_is_stored_in_float8_is_read_and_kept(method, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(stored_in_float8(nn.Linear(64, 32))), torch.randn(6, 64)
    expected, codes = model(x), model[0].weight.detach().clone()
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=method)
    adapted = get_peft_model(model, config, calibration=[x] if method == "eva" else None)
    assert "float8_e4m3fn" in str(adapted.plan)
    layer = adapted.layers["0"]
    assert layer.base_state == ("in_forward" if method == "pissa" else "kept")
    torch.testing.assert_close(adapted(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.weight, codes.float(), rtol=1e-6, atol=1e-6)
    assert layer.weight.dtype == torch.float32
    adapted(x).square().sum().backward()
    assert layer.lora_B.grad.any()
    with pytest.raises(
        ValueError, match="merging is not supported for layer '0', a Linear .float8"
    ):
        adapted.merge_adapter()
    adapted.save_pretrained(tmp_path)
    base = adapted.unload()
    assert torch.equal(base[0].weight.float(), codes.float())
    torch.testing.assert_close(type(adapted).from_pretrained(base, tmp_path)(x), expected)


def test_a_float8_weight_is_not_replaced():
    model = nn.Sequential(stored_in_float8(nn.Linear(64, 32)))
    with pytest.raises(TypeError, match="stored in float8_e4m3fn.*but loftq replaces it"):
        get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights="loftq"))


@pytest.mark.parametrize("method", ["pissa", "eva"])
def test_a_base_that_is_quantized_in_part(method):
    """Quantizers leave layers out; each target is treated as its own format allows."""
    kinds = ["GPTQ", "AWQ gemv", "torchao", "HQQLinear"]
    torch.manual_seed(0)
    packed = [quantized_layer(kind)[0] for kind in kinds]
    model = nn.Sequential(*(part for one in packed for part in (one, nn.GELU(), nn.Linear(32, 64))))
    x = torch.randn(6, 64)
    expected = model(x)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=method)
    if method == "eva":
        found = calibrate(model, config, [x])
        adapted = get_peft_model(model, config, calibration=found)
    else:
        adapted = get_peft_model(model, config)
    types = [target.module_type for target in adapted.plan.targets]
    assert types == ["GPTQ", "Linear", "AWQ", "Linear", "torchao", "Linear", "HQQLinear", "Linear"]
    states = [layer.base_state for layer in adapted.layers.values()]
    assert states == (["in_forward", "edited"] * 4 if method == "pissa" else ["kept"] * 8)
    torch.testing.assert_close(adapted(x), expected, rtol=1e-5, atol=1e-5)
    before = {name: layer.base_layer for name, layer in adapted.layers.items()}
    with pytest.raises(ValueError, match="merging is not supported for layer '0', a GPTQ"):
        adapted.merge_and_unload()
    assert before == {name: layer.base_layer for name, layer in adapted.layers.items()}
    torch.testing.assert_close(adapted.unload()(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        *(
            (name, f"because its packed weight is read-only, but {name} replaces it. "
             "Use the unquantized model, or bitsandbytes' quantization with original_weights")
            for name in REPLACING
        ),
        ("pissa", "but quantized_base='requantize' replaces it. Use quantized_base='in_forward'"),
    ],
)  # fmt: skip
def test_a_packed_weight_is_not_replaced(method, message):
    model = nn.Sequential(quantized_layer("GPTQ")[0])
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=method)
    with pytest.raises(TypeError, match=rf"'0' is a QuantLinear \(gptq 4 bits/32\).*{message}"):
        get_peft_model(model, config, quantized_base="requantize")
    assert type(model[0]) is quantizers.QuantLinear


@pytest.mark.parametrize("kind", ["GPTQ", "HQQLinear"])
def test_a_bias_that_is_no_parameter_is_not_trained(kind):
    model = nn.Sequential(quantized_layer(kind)[0])
    with pytest.raises(ValueError, match="bias='lora_only' is not supported for target '0'"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["0"], bias="lora_only"))


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
    assert any(word in name for word in ("8", "4", "3", "aqlm", "eetq", "bitnet", "inc"))
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


def test_a_layer_of_transformers_without_sizes_gets_an_adapter():
    library = pytest.importorskip("transformers.integrations.eetq")
    model = nn.Sequential(library.EetqLinear(64, 32))
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="kaiming")
    adapted = get_peft_model(model, config)
    assert adapted.layers["0"].lora_A.shape == (4, 64)
    assert adapted.layers["0"].lora_B.shape == (32, 4)


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
    rounds = pytest.warns(UserWarning, match="1 targets quantize their inputs, the first is '1'")
    with rounds if kind in ROUNDING else nullcontext():
        data = Batches([x]) if method == "eva" else None
        adapted = get_peft_model(model, config, calibration=data)
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
            with pytest.raises(ValueError, match="merging is not supported for layer '1', a "):
                merge()
        assert torch.equal(adapted(x), trained)
    base = adapted.unload()
    assert base[1] is module
    with torch.no_grad():
        assert torch.equal(base(x), expected)
        loaded = type(adapted).from_pretrained(base, tmp_path)
        torch.testing.assert_close(loaded(x), trained, rtol=1e-6, atol=1e-6)


class Transposed(ReadOnlyFormat):
    """A format whose author returns the stored values without transposing them."""

    name = "Transposed"

    def matches(self, module):
        return isinstance(module, nn.Linear)

    def values(self, module):
        return module.weight.T

    def float_dtype(self, module):
        return module.weight.dtype

    def describe(self, module):
        return "float32"


def test_values_must_have_the_shape_of_the_format():
    with pytest.raises(ValueError, match=r"Transposed.values returned shape \(16, 8\): must be"):
        Transposed().read(nn.Linear(16, 8))
