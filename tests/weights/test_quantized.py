"""Adapters on quantized bases: bitsandbytes' Linear4bit (NF4, FP4, double) and Linear8bitLt."""

import copy
import gc
import itertools
import re
import weakref

import pytest
import torch
from bitsandbytes import functional as bitsandbytes
from measures import (
    EPSILON,
    assert_gap,
    assert_unchanged,
    largest_ratio,
    logits,
    relative_gap,
    snapshot,
    train,
)
from methods import REPLACING, SPECS, SUBTRACTING, across, behavior, handling
from models import Batches, data_of, llama, spread_weight, token_batches
from networks import PACKED_SHAPES, Chain, chain_inputs, linear
from packing import kept_plain
from products import chosen, every_value, thinned
from safetensors.torch import save_file
from torch import nn

from lora_init import LoraConfig, LoraModel, get_peft_model
from lora_init.injection import base as settling
from lora_init.weights.bitsandbytes import PackedFormat
from lora_init.weights.kinds import known_format, oriented_weight

pytestmark = pytest.mark.sampled(3)

PACKINGS = {
    "nf4 double": ("Linear4bit", {}),
    "nf4": ("Linear4bit", {"compress_statistics": False}),
    "fp4 double": ("Linear4bit", {"quant_type": "fp4"}),
    "fp4": ("Linear4bit", {"quant_type": "fp4", "compress_statistics": False}),
    "int8": ("Linear8bitLt", {}),
}
FOUR_BITS = [name for name in PACKINGS if name != "int8"]
every_packing = pytest.mark.parametrize("packing", PACKINGS)
every_four_bits = pytest.mark.parametrize("packing", FOUR_BITS)
DECOMPOSING = [name for name in SUBTRACTING if "weight" in SPECS[name].reads]
each_packing_and_method = pytest.mark.parametrize(
    ("method", "packing"),
    thinned(
        list(itertools.product(SUBTRACTING, PACKINGS)),
        lambda method, packing: packing,
        lambda method, packing: behavior(method),
    ),
)
repacking_cpu = pytest.mark.skipif(
    not bitsandbytes.has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only"
)


def original():
    return Chain(shapes=PACKED_SHAPES)


def packed_chain(packing, names=tuple(PACKED_SHAPES)):
    """`original()` with the modules `names` quantized."""
    model = original()
    kind, settings = PACKINGS[packing]
    for name in names:
        module = model.get_submodule(name)
        setattr(model, name, linear(kind, module.weight, module.bias, **settings))
    return model


def inputs(rows=30, seed=1):
    return chain_inputs(rows, PACKED_SHAPES["square"][1], seed=seed)


def adapt(base, method, *, alpha=8, targets=tuple(PACKED_SHAPES), settings=None, **arguments):
    config = LoraConfig(
        r=4,
        lora_alpha=alpha,
        target_modules=list(targets),
        init_lora_weights=method,
        **settings or {},
    )
    data = data_of(config.initializer()[0], Batches(inputs(40, seed) for seed in (2, 3)))
    return get_peft_model(base, config, calibration=data, **arguments)


def weight_errors(model, reference):
    """‖W - W' ‖ / ‖W‖ by layer, W' the weight that the adapted layer computes with."""
    errors = {}
    for name, layer in model.layers.items():
        weight = reference.get_submodule(name).weight
        errors[name] = relative_gap(layer.merged_weight(), weight)
    return errors


# -- what is decomposed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "packing"), across([*DECOMPOSING, "eva"], list(PACKINGS), group=behavior)
)
def test_factors_are_those_of_the_dequantized_weight(method, packing):
    base = packed_chain(packing)
    dequantized = original()
    with torch.no_grad():
        for name in PACKED_SHAPES:
            weight = oriented_weight(base.get_submodule(name))
            dequantized.get_submodule(name).weight.copy_(weight)
    # One target: the calibration of the others would see the kernels' own rounding.
    expected = adapt(dequantized, method, targets=["square"]).layers["square"]
    layer = adapt(base, method, targets=["square"]).layers["square"]
    assert torch.equal(layer.lora_A, expected.lora_A)
    assert torch.equal(layer.lora_B, expected.lora_B)
    assert layer.base_state == ("kept" if method == "eva" else "in_forward")


@pytest.mark.parametrize(("method", "packing"), across(DECOMPOSING, list(PACKINGS), group=behavior))
def test_original_weights_are_decomposed_where_given(method, packing):
    base = packed_chain(packing)
    expected = adapt(original(), method, targets=["square"]).layers["square"]
    model = adapt(base, method, original_weights=original().state_dict())
    assert torch.equal(model.layers["square"].lora_A, expected.lora_A)
    assert torch.equal(model.layers["square"].lora_B, expected.lora_B)
    assert_gap(model(inputs()), kept_plain(packed_chain(packing))(inputs()), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_packing
def test_plan_says_what_is_packed(packing, dtype):
    plan = adapt(packed_chain(packing), "pissa", dry_run=True)
    names = {"nf4": "nf4/64", "fp4": "fp4/64", "int8": "int8"}
    kind, *double = packing.split()
    for target in plan.targets:
        assert target.quantized
        assert target.dtype == " ".join([names[kind], *double])
        assert target.shape == PACKED_SHAPES[target.name]
        assert target.dtype in str(plan)


# -- bitsandbytes' repacking -----------------------------------------------------------------------


@torch.no_grad()
def evaluated(base):
    """The base after an evaluation, which repacks its 4-bit weights and rounds their scales."""
    base.eval()(inputs())
    return base


@repacking_cpu
@every_four_bits
def test_an_evaluation_repacks(packing):
    """The trap itself: without it the tests below would show nothing."""
    base = evaluated(packed_chain(packing))
    assert base.tall.weight.quant_state.packing_format_for_cpu


@pytest.mark.parametrize(
    ("packing", "method", "use_dora"),
    thinned(
        list(itertools.product(PACKINGS, ["kaiming", *SUBTRACTING], [False, True])),
        lambda packing, method, use_dora: (packing, handling(method), use_dora),
        lambda packing, method, use_dora: behavior(method),
    ),
)
@pytest.mark.filterwarnings("ignore:merged into")
def test_initialize_merge_and_dora_after_an_evaluation(packing, method, use_dora):
    base = evaluated(packed_chain(packing))
    reference, x = kept_plain(base), inputs()
    with torch.no_grad():
        repacked_output = copy.deepcopy(base)(x)
    weights = {name: oriented_weight(base.get_submodule(name)).clone() for name in PACKED_SHAPES}
    model = adapt(base, method, settings={"use_dora": use_dora})
    for name, weight in weights.items():
        assert torch.equal(oriented_weight(base.get_submodule(name).base_layer), weight)
    tolerance = 3 * EPSILON[torch.float32] * largest_ratio(model, reference)
    with torch.no_grad():
        assert_gap(model(x), reference(x), tolerance)
        train(model)
        trained = model(x)
        if packing != "int8":  # which bitsandbytes computes by another kernel in training
            assert_gap(model.train()(x), trained, tolerance)
        model.eval().merge_adapter()
        assert_gap(model(x), trained, 0.4)
        model.unmerge_adapter()
        assert torch.equal(model(x), trained)
        with model.disable_adapter():
            assert torch.equal(model(x), reference(x))
        restored = model.unload()
        assert torch.equal(restored(x), repacked_output)


@pytest.mark.parametrize("adapted", [["0"], ["0", "2"]], ids=["before", "both"])
@every_packing
def test_gradients_pass_a_packed_layer_after_an_evaluation(packing, adapted):
    kind, settings = PACKINGS[packing]
    base = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), linear(kind, spread_weight(96, 64), **settings)
    ).eval()
    with torch.no_grad():
        base(inputs())
    model = get_peft_model(base, LoraConfig(r=4, target_modules=adapted))
    with torch.no_grad():
        model(inputs())
    for _ in range(2):  # and after an evaluation of the adapted model
        model.zero_grad()
        model(inputs()).pow(2).sum().backward()
        for name in adapted:
            assert model.layers[name].lora_B.grad.abs().max() > 0, name
        with torch.no_grad():
            model.eval()(inputs())


@every_packing
def test_unadapted_packed_layers_are_given_back_as_they_were(packing):
    base = packed_chain(packing)
    before = snapshot(base)
    model = train(adapt(base, "pissa", targets=["tall"]))
    with torch.no_grad():
        model.eval()(inputs())
    restored = model.unload()
    assert_unchanged(restored, before | {"training": snapshot(restored)["training"]})


# -- the residual packed again ---------------------------------------------------------------------


@each_packing_and_method
def test_requantized_residual_reports_its_error(method, packing):
    base = packed_chain(packing)
    weights = {name: oriented_weight(base.get_submodule(name)) for name in PACKED_SHAPES}
    model = adapt(base, method, quantized_base="requantize")
    for row in model.init_report().layers:
        layer, weight = model.layers[row.name], weights[row.name].double()
        assert row.base == "replaced"
        # The codes hold the residual: no second product in the forward pass.
        product = layer.scaling * layer.initial_lora_B.double() @ layer.initial_lora_A.double()
        quantizer = known_format(layer.base_layer).quantizer(layer.base_layer)
        packed = oriented_weight(layer.base_layer)
        assert_gap(packed, quantizer.roundtrip((weight - product).float()), 1e-5)
        assert row.error == pytest.approx(relative_gap(packed + product, weight), abs=1e-5)
        before = relative_gap(quantizer.roundtrip(weight.float()), weight)
        assert row.details["error_without_adapter"] == pytest.approx(before, abs=1e-5)
        assert row.details["quantizer"] == quantizer.name
        x = chain_inputs(20, weight.shape[1])
        # LLM.int8 rounds the activations as well.
        tolerance = 1e-5 if packing != "int8" else 2e-2
        expected = x.double() @ (packed + product).T + layer.base_layer.bias
        assert_gap(layer(x), expected, tolerance)


@each_packing_and_method
def test_requantized_base_is_lost_or_kept(method, packing):
    base, x = packed_chain(packing), inputs()
    model = train(adapt(base, method, quantized_base="requantize"))
    trained = model(x)
    message = "'square' was replaced by a quantized one and no copy.*keep_original=True"
    with (
        pytest.raises(RuntimeError, match=f"disable_adapter: .*{message}"),
        model.disable_adapter(),
    ):
        pass
    with pytest.raises(RuntimeError, match=f"unload: .*{message}"):
        model.unload()
    assert torch.equal(model(x), trained)

    base = packed_chain(packing)
    before, expected = snapshot(base), kept_plain(base)(x)
    model = train(adapt(base, method, quantized_base="requantize", keep_original=True))
    assert torch.equal(model(x), trained)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), trained)
    assert_unchanged(model.unload(), before)


@pytest.mark.parametrize("keep_original", [False, True], ids=["lost", "kept"])
@pytest.mark.parametrize("packing", chosen(PACKINGS, "int8"))
def test_a_lost_original_takes_no_memory(packing, keep_original):
    base = packed_chain(packing)
    weight = weakref.ref(base.tall.weight)
    model = adapt(base, "pissa", quantized_base="requantize", keep_original=keep_original)
    gc.collect()
    assert (weight() is not None) == keep_original
    assert model.layers["tall"].base_state == "replaced"


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("packing", chosen(PACKINGS, "nf4 double", "int8"))
def test_failure_in_the_middle_of_requantizing_is_undone(packing, call, monkeypatch):
    base = packed_chain(packing, names=["square", "wide"])  # one of three is float, and edited
    before, calls = snapshot(base), []

    def failing(change):
        def one(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                raise MemoryError("no memory left")
            return change(*args, **kwargs)

        return one

    monkeypatch.setattr(settling, "add_product", failing(settling.add_product))
    monkeypatch.setattr(PackedFormat, "write", failing(PackedFormat.write))
    with pytest.raises(MemoryError, match="no memory left"):
        adapt(base, "pissa", quantized_base="requantize")
    after = snapshot(base)
    for key, value in before["state"].items():
        torch.testing.assert_close(after["state"][key], value, rtol=0, atol=1e-6)
    assert_unchanged(base, before | {"state": after["state"]})


def test_requantize_edits_float_layers():
    base = packed_chain("nf4", names=["wide"])
    model = adapt(base, "pissa", quantized_base="requantize")
    states = {name: layer.base_state for name, layer in model.layers.items()}
    assert states == {"square": "edited", "tall": "edited", "wide": "replaced"}


@every_packing
def test_requantized_adapter_is_rebuilt_from_its_file(packing, tmp_path):
    base = packed_chain(packing)
    model = train(adapt(copy.deepcopy(base), "pissa", quantized_base="requantize"))
    model.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert loaded.layers["tall"].base_state == "replaced"
    assert torch.equal(loaded(inputs()), model(inputs()))


# -- LoftQ and QPiSSA ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packing", "method"), every_value(itertools.product(PACKINGS, REPLACING), 2)
)
def test_quantized_base_without_original_weights_is_refused(method, packing):
    base = packed_chain(packing)
    before = snapshot(base)
    with pytest.raises(ValueError, match=f"'square' is quantized already.*{method}.*pass original"):
        adapt(base, method)
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    ("packing", "method"), every_value(itertools.product(PACKINGS, REPLACING), 2)
)
def test_original_weights_make_up_for_the_quantization(method, packing, tmp_path):
    """Nearer to the ORIGINAL weights than plain quantization, at any scaling, from a file too."""
    save_file(original().state_dict(), tmp_path / "model.safetensors")
    plain = {
        name: relative_gap(oriented_weight(packed_chain(packing).get_submodule(name)),
                           original().get_submodule(name).weight)
        for name in PACKED_SHAPES
    }  # fmt: skip
    for alpha in (1, 8, 64):
        model = adapt(packed_chain(packing), method, alpha=alpha, original_weights=tmp_path)
        errors = weight_errors(model, original())
        for row in model.init_report().layers:
            # What looks at the inputs puts the output right, and the weight as far as that goes.
            share = 0.96 if model.plan.calibration else 0.9
            assert errors[row.name] < share * plain[row.name]
            # Its own report knows: the base keeps its quantizer, packed without another loss.
            assert row.error == pytest.approx(errors[row.name], rel=1e-3)
            assert row.details["error_without_adapter"] == pytest.approx(plain[row.name], rel=1e-3)
            module = model.layers[row.name].base_layer
            own = known_format(module).quantizer(module)
            assert row.details["quantizer"] == own.name


# -- original_weights ------------------------------------------------------------------------------


def refused(match, base, method="pissa", error=ValueError, **arguments):
    before = snapshot(base)
    with pytest.raises(error, match=match):
        adapt(base, method, **arguments)
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    ("packing", "method"), every_value(itertools.product(PACKINGS, ["pissa", *REPLACING]), 2)
)
def test_wrong_checkpoints_are_refused_by_name(method, packing, tmp_path):
    base, state = packed_chain(packing), original().state_dict()
    other = Chain(shapes=PACKED_SHAPES, seed=1).state_dict()
    refused(
        r"original_weights: the weight of '\w+' differs from the model's by 1.* of its norm",
        base, method, original_weights=other,
    )  # fmt: skip
    refused(
        r"original_weights: the weight of 'tall' is \(64, 128\) there and \(128, 64\) in the model",
        base, method, original_weights=state | {"tall.weight": state["tall.weight"].T},
    )  # fmt: skip
    del state["wide.weight"]
    refused("original_weights: .*holds no weight for 'wide'", base, method, original_weights=state)
    refused("no file or folder", base, method, FileNotFoundError, original_weights=tmp_path / "x")


@pytest.mark.wrong_types
def test_original_weights_are_a_path_or_a_mapping():
    message = "original_weights is of type int; it must be a folder"
    refused(message, packed_chain("nf4"), error=TypeError, original_weights=3)


@pytest.mark.parametrize("method", ["kaiming", "pissa", *REPLACING])
def test_original_weights_without_a_quantized_target(method):
    refused(
        "original_weights is given, but no target is quantized.*leave it out",
        original(), method, original_weights=original().state_dict(),
    )  # fmt: skip


def test_a_quantized_checkpoint_is_no_original():
    state = packed_chain("nf4").state_dict()
    refused("'square' is quantized already", packed_chain("nf4"), original_weights=state)


@pytest.mark.wrong_types
@pytest.mark.parametrize("value", ["in-forward", None, True, ["requantize"]])
def test_quantized_base_has_two_values(value):
    message = f"quantized_base={value!r} is not supported: must be one of in_forward, requantize"
    refused(re.escape(message), packed_chain("nf4"), quantized_base=value)


def test_requantize_without_a_quantized_target():
    refused(
        "quantized_base='requantize' is not supported: no target is quantized. Leave it out",
        original(), quantized_base="requantize",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_unquantized_modules_are_refused(kind):
    """Before `.to(device)` bitsandbytes' modules still hold floats."""
    from bitsandbytes import nn as modules

    class_ = getattr(modules, kind)
    base = nn.Sequential(nn.Linear(64, 64), class_(64, 64))
    with pytest.raises(ValueError, match=r"holds no quantized weight; .*\.to\("):
        adapt(base, "kaiming", targets=["1"])


def test_a_packed_module_cannot_be_trained_whole():
    refused(
        "modules_to_save: 'wide' is a Linear4bit, whose codes cannot be trained",
        packed_chain("nf4"), targets=["tall"], settings={"modules_to_save": ["wide"]},
    )  # fmt: skip


# -- merging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packing", "method", "use_dora"),
    every_value(itertools.product(PACKINGS, ["kaiming", "pissa"], [False, True]), 3),
)
def test_merging_warns_with_the_error_it_adds(packing, method, use_dora):
    base = packed_chain(packing)
    model = train(adapt(base, method, settings={"use_dora": use_dora}))
    wanted = {name: layer.merged_weight() for name, layer in model.layers.items()}
    with pytest.warns(UserWarning, match="merged into 3 quantized weights") as caught:
        model.merge_adapter()
    errors = {
        name: relative_gap(oriented_weight(layer.base_layer), wanted[name])
        for name, layer in model.layers.items()
    }
    worst = max(errors, key=errors.__getitem__)
    assert 1e-3 < errors[worst] < 0.2
    message = str(caught[0].message)
    assert f"{errors[worst]:.1e} in {worst!r}" in message
    assert f"{sum(errors.values()) / 3:.1e} on average" in message
    assert "merge into the unquantized model" in message


# -- a model of transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("packing", chosen(PACKINGS, "nf4 double", "int8"))
def test_a_quantized_llama(packing, tmp_path):
    """Calibrated, evaluated and trained; its embedding and head are float."""
    floating, batches = llama(), token_batches()
    kind, settings = PACKINGS[packing]
    base = llama()
    for layer in base.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = layer.self_attn.get_submodule(name).weight
            setattr(layer.self_attn, name, linear(kind, weight, **settings))
    expected = logits(kept_plain(base), batches)
    for method in ("corda", "eva", "loftq"):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=method)
        spec = config.initializer()[0]
        model = get_peft_model(
            copy.deepcopy(base), config, calibration=batches if spec.needs_data else None,
            original_weights=floating.state_dict() if spec.base == "replace" else None,
            keep_original=spec.base == "replace",
        )  # fmt: skip
        if spec.preserves_output:
            assert_gap(logits(model, batches), expected, 1e-5)
        trained = logits(train(model), batches)
        assert relative_gap(trained[0], expected[0]) > 1e-3
        model.save_pretrained(tmp_path / method)
        with model.disable_adapter():
            assert_gap(logits(model, batches), expected, 0.0)
        loaded = LoraModel.from_pretrained(
            model.unload(), tmp_path / method,
            original_weights=floating.state_dict() if spec.base == "replace" else None,
        )  # fmt: skip
        assert_gap(logits(loaded, batches), trained, 1e-5)
