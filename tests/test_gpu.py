"""On a CUDA device: the same adapters as on the CPU, wherever the model lives."""

import copy
import warnings

import pytest
import torch
from measures import (
    EPSILON,
    assert_gap,
    largest_ratio,
    norm_ratio,
    relative_gap,
    train,
    without_bias,
)
from models import Batches, data_of
from networks import Case
from packing import kept_plain, on_device
from torch import nn
from uniform import uniform

from experiments.gpu.agreement import OBJECTIVE_PROMISE, PROMISE, gap, objective_gap
from experiments.gpu.lifecycle import exact_convolutions
from lora_init import LoraConfig, LoraModel, get_peft_model, list_initializers, reinitialize
from lora_init.weights.kinds import oriented_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 160))


def adapted(spec, *, model_on, device):
    generator = torch.Generator().manual_seed(1)
    batches = Batches(torch.randn(200, 96, generator=generator).to(model_on) for _ in range(3))
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights={"name": spec.name})
    return get_peft_model(
        network().to(model_on), config, calibration=batches, device=device, seed=3
    )


@pytest.mark.parametrize("spec", list_initializers(), ids=lambda spec: spec.name)
@pytest.mark.parametrize(("model_on", "device"), [("cpu", "cuda"), ("cuda", None)])
def test_the_same_product_as_on_the_cpu(spec, model_on, device):
    reference = adapted(spec, model_on="cpu", device=None)
    model = adapted(spec, model_on=model_on, device=device)
    assert {p.device.type for p in model.parameters()} == {model_on}
    assert_agreement(spec, model, reference)


def assert_agreement(spec, model, reference):
    """The same s B A as on the CPU; of methods that quantize, the same error.

    A rounding that differs moves a code, and the next iteration of such a method starts elsewhere.
    """
    if spec.base == "replace":
        assert objective_gap(model, reference) <= OBJECTIVE_PROMISE
    else:
        assert gap(model, reference) <= PROMISE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_is_preserved_on_the_device(dtype):
    base = network().to("cuda", dtype)
    x = torch.randn(10, 96, device="cuda", dtype=dtype)
    expected = base(x)
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights="pissa")
    gap = (get_peft_model(base, config)(x) - expected).norm() / expected.norm()
    assert gap <= max(2e-6, torch.finfo(dtype).eps)


# -- every module type -----------------------------------------------------------------------------

DEVICE = "cuda"
CASES = [
    Case(kind, dtype)
    for kind in ("Linear", "Conv1D", "Conv2d", "Embedding")
    for dtype in (torch.float32, torch.bfloat16)
]
PACKED = [Case("Linear4bit", torch.float16), Case("Linear8bitLt", torch.float16)]
every_case = pytest.mark.parametrize("case", CASES + PACKED, ids=str)
packed_cases = pytest.mark.parametrize("case", PACKED, ids=str)
# Every second method with DoRA; the other half of all pairs with `make test-all`.
every_second = pytest.mark.parametrize(
    "dora_first", [False, pytest.param(True, marks=pytest.mark.exhaustive)]
)


@pytest.fixture(autouse=True)
def convolutions_in_full_precision():
    with exact_convolutions():
        yield


@pytest.fixture(autouse=True)
def packed_modules(request):
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if case is not None and case.packed:
        pytest.importorskip("bitsandbytes")


def for_every_method(case, dora_first, check):
    """`check(spec, use_dora)` of every method in one test; its failures name their methods."""
    failures = []
    specs = [spec for spec in list_initializers() if case.kind in spec.module_types]
    for number, spec in enumerate(specs):
        use_dora = (number % 2 == 0) == dora_first
        try:
            check(spec, use_dora)
        except Exception as error:
            error.add_note(f"{spec.name}, use_dora={use_dora}")
            failures.append(error)
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(specs)} methods on {case}", failures)


def moved(value):
    return value.to(DEVICE)


def adapt(spec, case, base, *, use_dora=False, **arguments):
    options = {"name": spec.name, **uniform(spec.name)}
    config = LoraConfig(
        r=4, target_modules=list(case.shapes), init_lora_weights=options, use_dora=use_dora
    )
    return get_peft_model(
        base,
        config,
        calibration=data_of(spec, case.calibration()),
        original_weights=case.originals() if spec.base == "replace" else None,
        **arguments,
    )


@every_second
@every_case
def test_the_whole_life_of_an_adapter(case, dora_first, tmp_path):
    """Step 0, training, disabling, merging, files and unloading, all on the device."""

    def check(spec, use_dora):
        whole_life(spec, case, use_dora, tmp_path / spec.name)

    for_every_method(case, dora_first, check)


def whole_life(spec, case, use_dora, folder):
    base = on_device(case.build(), DEVICE)
    reference = kept_plain(base)
    model = adapt(spec, case, copy.deepcopy(base), use_dora=use_dora, keep_original=True)
    assert {p.device.type for p in model.parameters()} == {DEVICE}
    for name, layer in model.layers.items():
        x, module = moved(case.layer_inputs(name)), reference.get_submodule(name)
        if spec.preserves_output:
            tolerance = EPSILON[case.dtype] * norm_ratio(model, reference, name)
            assert_gap(layer(x), module(x), tolerance, without_bias(module, x))

    x = moved(case.inputs())
    model(x).float().pow(2).sum().backward()
    train(model)
    trained = model(x)
    assert relative_gap(trained, reference(x)) > 1e-4
    ratio = largest_ratio(model, reference)
    with model.disable_adapter():
        assert_gap(model(x), reference(x), 3 * EPSILON[case.dtype] * ratio)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a packed merge adds an error
        model.merge_adapter()
    assert_gap(model(x), trained, 0.4 if case.packed else 9 * EPSILON[case.dtype] * ratio)
    model.unmerge_adapter()
    assert torch.equal(model(x), trained)

    model.save_pretrained(folder)
    loaded = LoraModel.from_pretrained(
        copy.deepcopy(base), folder,
        original_weights=case.originals() if spec.base == "replace" else None,
    )  # fmt: skip
    assert_gap(loaded(x), trained, 9 * EPSILON[case.dtype] * ratio)
    restored = model.unload()
    for name in case.shapes:
        weight = oriented_weight(base.get_submodule(name))
        error = (oriented_weight(restored.get_submodule(name)) - weight).abs().max()
        assert error <= 1e-6 * weight.abs().max()


@every_second
@every_case
def test_initialized_on_the_device_for_a_model_on_the_cpu(case, dora_first):
    """The same product, and nothing of the model has moved."""

    def check(spec, use_dora):
        expected = adapt(spec, case, case.build(), use_dora=use_dora)
        model = adapt(spec, case, case.build(), use_dora=use_dora, device=DEVICE)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert_agreement(spec, model, expected)
        for name, layer in model.layers.items():
            reference = expected.layers[name]
            assert layer.base_state == reference.base_state
            if use_dora and spec.base != "replace":
                assert_gap(layer.lora_magnitude_vector, reference.lora_magnitude_vector, 1e-4)

    for_every_method(case, dora_first, check)


@packed_cases
def test_packed_weights_are_the_same_on_both_devices(case):
    base = case.build()
    weights = {name: oriented_weight(base.get_submodule(name)) for name in case.shapes}
    on_device(base, DEVICE)
    for name, weight in weights.items():
        assert torch.equal(oriented_weight(base.get_submodule(name)).cpu(), weight)


@packed_cases
def test_requantized_residual_on_the_device(case):
    base = on_device(case.build(), DEVICE)
    config = LoraConfig(r=4, target_modules=list(case.shapes), init_lora_weights="pissa")
    model = get_peft_model(base, config, quantized_base="requantize", keep_original=True)
    for row in model.init_report().layers:
        assert row.base == "replaced"
        assert row.error < 0.1
    x = moved(case.inputs())
    expected = on_device(case.build(), DEVICE)(x)
    with model.disable_adapter():
        assert_gap(model(x), expected, EPSILON[case.dtype])
    again = reinitialize(model, LoraConfig(r=4, target_modules=["tall"]))
    assert_gap(again(x), expected, EPSILON[case.dtype])


def test_an_adapter_moves_with_its_model():
    """Made on the CPU, moved, disabled and unloaded on the device; replaced bases are kept."""
    case = Case()
    for method in ("kaiming", "pissa", "loftq"):
        config = LoraConfig(
            r=4, target_modules=list(case.shapes), init_lora_weights=method, use_dora=True,
            bias="all",
        )  # fmt: skip
        model = train(get_peft_model(case.build(), config, keep_original=True))
        expected = model(case.inputs())
        model.to(DEVICE)
        x = moved(case.inputs())
        assert_gap(model(x).cpu(), expected, 1e-5)
        with model.disable_adapter():
            assert_gap(model(x).cpu(), case.build()(case.inputs()), 1e-5)
        assert_gap(model(x).cpu(), expected, 1e-5)
        assert_gap(model.unload()(x).cpu(), case.build()(case.inputs()), 1e-5)
