"""bitsandbytes' packed modules, against bitsandbytes itself and against codes decoded by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from packing import on_device
from simulated_device import CUDA, place, simulated_cuda
from torch import nn

from lora_init.quantization import Quantizer
from lora_init.weights.kinds import FORMATS, is_quantized, known_format, oriented_weight

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

repacking_cpu = pytest.mark.skipif(
    not functional.has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only"
)
FOUR_BITS = [(kind, double) for kind in ("nf4", "fp4") for double in (False, True)]
every_four_bits = pytest.mark.parametrize(("kind", "double"), FOUR_BITS)
every_kind = pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4 double", "fp4 double", "int8"])


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def four_bits(
    weight,
    kind="nf4",
    double=False,
    *,
    storage=torch.uint8,
    block_size=64,
    bias=False,
    quantise=True,
):
    out_features, in_features = weight.shape
    module = bitsandbytes.nn.Linear4bit(
        in_features,
        out_features,
        bias=bias,
        compute_dtype=torch.float32,
        compress_statistics=double,
        quant_type=kind,
        quant_storage=storage,
    )
    module.weight = bitsandbytes.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        blocksize=block_size,
        compress_statistics=double,
        quant_type=kind,
        quant_storage=storage,
        module=module,
    )
    return module.to("cpu") if quantise else module


def eight_bits(weight, *, bias=False, has_fp16_weights=False, quantise=True):
    out_features, in_features = weight.shape
    module = bitsandbytes.nn.Linear8bitLt(
        in_features, out_features, bias=bias, has_fp16_weights=has_fp16_weights
    )
    module.weight.data.copy_(weight)
    return module.to("cpu") if quantise else module


def make(kind, weight, **options):
    if kind == "int8":
        return eight_bits(weight, **options)
    name, *double = kind.split()
    return four_bits(weight, name, bool(double), **options)


def product_with_identity(module, *, training):
    module.train(training)
    with torch.no_grad():
        return module(torch.eye(module.in_features)).T


def decoded(module):
    """Codes and scales of a module that has never run, one element at a time, in float64."""
    state = module.weight.quant_state
    table = functional.get_4bit_type(state.quant_type, device="cpu").tolist()
    scales = state.absmax.double()
    if state.nested:
        inner = state.state2
        largest = inner.absmax.double()[torch.arange(scales.numel()) // inner.blocksize]
        scales = inner.code.double()[state.absmax.long()] * largest + state.offset.double()
    values = []
    for byte in module.weight.data.view(torch.uint8).flatten().tolist():
        for code in (byte >> 4, byte & 15):
            values.append(table[code] * scales[len(values) // state.blocksize].item())
            if len(values) == module.in_features * module.out_features:
                return torch.tensor(values, dtype=torch.float64).reshape(module.out_features, -1)


def described(module):
    return known_format(module).describe(module)


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert torch.equal(actual[name], expected[name]), name


def test_detection_is_by_class():
    assert is_quantized(four_bits(gaussian(32, 64)))
    assert is_quantized(eight_bits(gaussian(32, 64)))
    assert is_quantized(bitsandbytes.nn.LinearNF4(64, 32))
    plain = nn.Linear(4, 4)
    assert not is_quantized(plain)
    plain.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    assert not is_quantized(plain)


@every_four_bits
@pytest.mark.parametrize("shape", [(64, 128), (48, 96), (7, 131), (3, 5), (10, 100)])
def test_dequantized_is_what_the_codes_say(shape, kind, double):
    module = four_bits(gaussian(*shape), kind, double)
    values = oriented_weight(module)
    assert values.dtype == torch.float32
    assert known_format(module).shape(module) == shape == values.shape
    torch.testing.assert_close(values.double(), decoded(module), rtol=1e-6, atol=1e-8)
    assert torch.equal(values, known_format(module).quantizer(module).roundtrip(gaussian(*shape)))


@every_four_bits
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantized_under_any_storage_and_weight_dtype(kind, double, storage, dtype):
    weight = gaussian(32, 64).to(dtype)
    module = four_bits(weight, kind, double, storage=storage, block_size=32)
    assert module.weight.dtype == storage
    values = oriented_weight(module)
    assert torch.equal(values, Quantizer(kind, 4, 32, double).roundtrip(weight))
    torch.testing.assert_close(values.double(), decoded(module), rtol=1e-6, atol=1e-8)


@every_four_bits
def test_dequantized_is_what_a_four_bit_module_multiplies_by(kind, double):
    module = four_bits(gaussian(64, 128), kind, double)
    before = copy.deepcopy(module)
    values = oriented_weight(module)
    torch.testing.assert_close(product_with_identity(module, training=True), values)
    assert_same_state(module.state_dict(), state_of(before))


@repacking_cpu
@every_four_bits
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_dequantized_after_the_repacking(kind, double, storage):
    module = four_bits(gaussian(64, 128), kind, double, storage=storage)
    exact = oriented_weight(module)
    product = product_with_identity(module, training=False)
    data, state = module.weight.data, module.weight.quant_state
    assert state.packing_format_for_cpu
    fields = dict(vars(state))
    values = oriented_weight(module)

    # Only the scales are rounded, to bfloat16: the same codes, block by block.
    blocks = values.reshape(-1, 64) / exact.reshape(-1, 64)
    assert (blocks[exact.reshape(-1, 64) != 0] - 1).abs().max() < 2**-8
    scale = exact.reshape(-1, 64).abs().amax(1).bfloat16().float()
    torch.testing.assert_close(values.reshape(-1, 64).abs().amax(1), scale, rtol=1e-6, atol=0)
    # Its kernel rounds table, product and output to bfloat16.
    torch.testing.assert_close(product, values, rtol=2**-7, atol=1e-6)
    later = product_with_identity(module, training=True)
    torch.testing.assert_close(later, values, rtol=2**-7, atol=1e-6)

    assert known_format(module).shape(module) == (64, 128)
    assert known_format(module).quantizer(module) == Quantizer(kind, 4, 64, double)
    assert module.weight.data.data_ptr() == data.data_ptr()
    assert all(vars(state)[name] is fields[name] for name in fields)


@repacking_cpu
def test_dequantized_after_state_dict_has_half_undone_the_repacking():
    module = four_bits(gaussian(64, 128))
    product_with_identity(module, training=False)
    values = oriented_weight(module)
    module.state_dict()
    assert not module.weight.quant_state.packing_format_for_cpu
    assert torch.equal(oriented_weight(module), values)


@repacking_cpu
def test_dequantized_where_the_repacking_failed():
    module = four_bits(gaussian(64, 96), double=True)
    values = oriented_weight(module)
    with pytest.raises(RuntimeError, match="invalid for input"):
        product_with_identity(module, training=False)
    assert torch.equal(oriented_weight(module), values)
    assert known_format(module).describe(module) == "nf4/64 double"


@pytest.mark.parametrize("training", [True, False])
def test_dequantized_eight_bits_before_and_after_the_first_forward(training):
    weight = gaussian(48, 33)
    module = eight_bits(weight)
    codes, scale = module.weight.CB.clone(), module.weight.SCB.clone()
    values = oriented_weight(module)
    expected = codes.double() * scale.double()[:, None] / 127
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-9)
    assert (values - weight).abs().max() < 0.6 * scale.max() / 127

    product = product_with_identity(module, training=training)
    assert module.weight.CB is None
    assert torch.equal(oriented_weight(module), values)
    torch.testing.assert_close(product, values, rtol=2e-3, atol=1e-5)
    assert known_format(module).shape(module) == (48, 33)


@every_kind
@pytest.mark.parametrize("ran", [None, True, False], ids=["new", "trained", "evaluated"])
def test_requantize_equals_the_quantizer_and_the_forward(kind, ran):
    module = make(kind, gaussian(64, 128), bias=True)
    bias = module.bias.detach().clone()
    if ran is not None:
        product_with_identity(module, training=ran)
    weight = gaussian(64, 128, seed=1)
    quantizer = known_format(module).quantizer(module)
    old, device = module.weight, module.weight.device
    known_format(module).write(module, weight)

    values = oriented_weight(module)
    assert torch.equal(values, quantizer.roundtrip(weight))
    assert module.weight is not old
    assert type(module.weight) is type(old)
    assert not module.weight.requires_grad
    assert module.weight.device == device
    assert known_format(module).quantizer(module) == quantizer
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    for training in (True, False, True):
        product = product_with_identity(module, training=training)
        torch.testing.assert_close(product - bias[:, None], values, rtol=2**-7, atol=2e-3)


@every_four_bits
@pytest.mark.parametrize("shape", [(64, 128), (7, 131), (10, 100)])
def test_requantize_is_bitsandbytes_own_on_a_cpu(shape, kind, double):
    weight = gaussian(*shape, seed=1)
    module = four_bits(gaussian(*shape), kind, double)
    known_format(module).write(module, weight)
    assert_same_state(module.state_dict(), four_bits(weight, kind, double).state_dict())
    assert module.quant_state is module.weight.quant_state


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_requantize_keeps_the_storage_and_the_recorded_dtype(storage, training):
    weight = gaussian(64, 128).bfloat16()
    module = four_bits(weight, storage=storage, double=True)
    fresh = state_of(module)
    product_with_identity(module, training=training)
    known_format(module).write(module, weight)
    assert_same_state(module.state_dict(), fresh)
    assert module.weight.quant_storage == storage


@every_kind
def test_requantizing_the_values_keeps_them(kind):
    module = make(kind, gaussian(64, 128))
    codes, values = module.weight.data.clone(), oriented_weight(module)
    known_format(module).write(module, values)
    again = oriented_weight(module)
    if "fp4" not in kind:  # which has two codes for zero
        assert torch.equal(module.weight.data, codes)
    assert torch.equal(again == 0, values == 0)
    # The mean of the scales, and so their grid, moves under double quantisation.
    torch.testing.assert_close(again, values, rtol=1e-2 if "double" in kind else 1e-6, atol=0)


def test_requantize_of_eight_bits_does_not_round_to_float16():
    weight = gaussian(16, 32, seed=2) * 1e7  # beyond float16
    module = eight_bits(gaussian(16, 32))
    known_format(module).write(module, weight)
    assert (oriented_weight(module) - weight).abs().max() <= weight.abs().max() / 253


@every_kind
def test_put_back_restores_outputs_and_state_to_the_bit(kind):
    module = make(kind, gaussian(64, 128))
    untouched = copy.deepcopy(module)
    state, values = state_of(module), oriented_weight(module)
    held, parameter = known_format(module).hold(module), module.weight
    for _ in range(2):  # what was held can be put back again
        product_with_identity(module, training=False)
        known_format(module).write(module, gaussian(64, 128, seed=1))
        product_with_identity(module, training=False)
        product_with_identity(module, training=True)
        known_format(module).put_back(module, held)
        assert module.weight is parameter
        assert torch.equal(oriented_weight(module), values)
        assert_same_state(module.state_dict(), state)
        for training in (True, False, True):
            expected = product_with_identity(copy.deepcopy(untouched), training=training)
            if kind != "int8":
                expected = product_with_identity(untouched, training=training)
            assert torch.equal(product_with_identity(module, training=training), expected)
        untouched = make(kind, gaussian(64, 128))


@every_kind
def test_put_back_of_a_module_that_had_run(kind):
    module = make(kind, gaussian(64, 128))
    product = product_with_identity(module, training=False)
    values, data = oriented_weight(module), module.weight.data.clone()
    held = known_format(module).hold(module)
    known_format(module).write(module, gaussian(64, 128, seed=1))
    product_with_identity(module, training=False)
    known_format(module).put_back(module, held)
    assert torch.equal(module.weight.data, data)
    assert torch.equal(oriented_weight(module), values)
    assert torch.equal(product_with_identity(module, training=False), product)


@pytest.mark.parametrize("ran", [True, False])
def test_8_bit_codes_that_are_put_back_elsewhere_take_their_memory_once(ran):
    module = make("int8", gaussian(64, 128))
    if ran:
        product_with_identity(module, training=False)
    held = known_format(module).hold(module)
    known_format(module).write(module, gaussian(64, 128, seed=1))
    with simulated_cuda():
        known_format(module).put_back(on_device(module, "cuda"), held)
        codes, scale = known_format(module).codes_and_scale(module)
        assert place(codes) == place(scale) == place(module.weight.data) == CUDA
        assert codes.data_ptr() == module.weight.data_ptr()


@every_kind
@pytest.mark.parametrize("ran", [True, False])
def test_a_deep_copy_is_independent(kind, ran):
    module = make(kind, gaussian(64, 128))
    if ran:
        product_with_identity(module, training=False)
    values = oriented_weight(module)
    twin = copy.deepcopy(module)
    assert torch.equal(oriented_weight(twin), values)
    known_format(twin).write(twin, gaussian(64, 128, seed=1))
    product_with_identity(twin, training=False)
    assert torch.equal(oriented_weight(module), values)
    copied = copy.deepcopy(twin)
    assert torch.equal(oriented_weight(copied), oriented_weight(twin))


@pytest.mark.parametrize("kind", ["nf4", "fp4 double", "int8"])
def test_a_requantized_state_loads_into_another_module(kind):
    module = make(kind, gaussian(64, 128))
    known_format(module).write(module, gaussian(64, 128, seed=1))
    state = state_of(module)
    other = make(kind, gaussian(64, 128))
    if kind == "int8":
        other.load_state_dict(state)
    else:
        statistics = {k.removeprefix("weight."): v for k, v in state.items() if k != "weight"}
        other.weight = bitsandbytes.nn.Params4bit.from_prequantized(
            state["weight"], statistics, device="cpu", module=other
        )
    assert torch.equal(oriented_weight(other), oriented_weight(module))


@repacking_cpu
@every_four_bits
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
@pytest.mark.parametrize("half_undone", [False, True])
def test_keep_plain_gives_derivatives_and_a_right_state(kind, double, storage, half_undone):
    module = four_bits(gaussian(64, 128), kind, double, storage=storage)
    shape = module.weight.shape
    held = known_format(module).hold(module)
    product_with_identity(module, training=False)
    if half_undone:
        module.state_dict()
    values = oriented_weight(module)
    known_format(module).keep_plain(module)
    assert torch.equal(oriented_weight(module), values)
    assert (module.weight.shape, module.weight.dtype) == (shape, storage)
    assert known_format(module).quantizer(module) == Quantizer(kind, 4, 64, double)
    for training in (False, True):
        product = product_with_identity(module, training=training)
        torch.testing.assert_close(product, values)
    inputs = gaussian(3, 128).requires_grad_()
    module(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, values.sum(0).expand(3, -1))
    state = module.state_dict()
    assert state["weight.absmax"].shape == (128,)
    known_format(module).put_back(module, held)
    product_with_identity(module, training=False)
    assert module.weight.quant_state.packing_format_for_cpu


def test_keep_plain_leaves_what_never_ran_alone():
    module = four_bits(gaussian(64, 128), double=True)
    state = state_of(module)
    known_format(module).keep_plain(module)
    product_with_identity(module, training=False)
    assert_same_state(module.state_dict(), state)
    known_format(eight_bits(gaussian(4, 8))).keep_plain(eight_bits(gaussian(4, 8)))


def test_descriptions():
    weight = gaussian(32, 64)
    assert described(four_bits(weight, double=True)) == "nf4/64 double"
    assert described(four_bits(weight, "fp4", block_size=128)) == "fp4/128"
    assert described(eight_bits(weight)) == "int8"


def test_unquantised_modules_are_refused():
    weight = gaussian(8, 64)
    four, eight = FORMATS["Linear4bit"], FORMATS["Linear8bitLt"]
    for function in (four.read, four.quantizer, four.hold, four.keep_plain):
        with pytest.raises(ValueError, match="holds no quantized weight; move it to its device"):
            function(four_bits(weight, quantise=False))
    for function in (eight.read, eight.quantizer, eight.hold):
        with pytest.raises(ValueError, match="holds no quantized weight; move it to its device"):
            function(eight_bits(weight, quantise=False))
        with pytest.raises(ValueError, match="has_fp16_weights=False"):
            function(eight_bits(weight, has_fp16_weights=True))
    with pytest.raises(ValueError, match=r"shape \(64, 8\).*needs \(8, 64\)"):
        four.write(four_bits(weight), weight.T)
