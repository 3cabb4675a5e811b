"""One suite over every registered initializer: what all of them promise.

A method that is registered is tested here without an edit. Tolerances are those of the project's
table of invariants; `EPSILON` and `norm_ratio` in `measures` spell them out.
"""

import copy
import functools
import warnings
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from measures import (
    EPSILON,
    assert_gap,
    assert_unchanged,
    largest_ratio,
    norm_ratio,
    relative_gap,
    snapshot,
    train,
    without_bias,
)
from methods import (
    METHODS,
    PRESERVING,
    REPLACING,
    RESTORABLE,
    SPECS,
    SUBTRACTING,
    WITH_DATA,
    across,
    behavior,
    every_method,
    every_method_and_group,
    handling,
    one_of_each,
)
from models import Batches, data_of, spread_weight
from networks import NETWORK_KINDS, SHAPES, Case, Chain, chain_calibration, chain_inputs
from packing import kept_plain
from products import thinned
from torch import nn
from transformers.pytorch_utils import Conv1D
from uniform import uniform

from lora_init import LoraConfig, LoraModel, WithLoss, get_peft_model, list_initializers
from lora_init.layers import LoraLayer
from lora_init.weights.kinds import FORMATS, oriented_weight

RANK = 4
KINDS = ["Linear", "Conv1D"]
DTYPES = [torch.float32, torch.bfloat16]
# alpha and use_rslora; alpha / r is 1/16, 1, 2 and 16, alpha / sqrt(r) is 4.
SCALINGS = {
    "s=1/16": (RANK / 16, False),
    "s=1": (RANK, False),
    "s=2": (2 * RANK, False),
    "s=16": (16 * RANK, False),
    "rslora": (8, True),
}
EXPECTED_SCALINGS = {"s=1/16": 1 / 16, "s=1": 1.0, "s=2": 2.0, "s=16": 16.0, "rslora": 4.0}
VARIANTS = {name: {"scaling": name} for name in SCALINGS} | {"dora": {"use_dora": True}}
BASES = [
    Case(one.name, dtype)
    for one in map(FORMATS.__getitem__, NETWORK_KINDS)
    for dtype in DTYPES[: 1 if one.quantized else None]
]
DRAWN = [spec.name for spec in list_initializers() if not spec.reads]
RANDOM = {*DRAWN, "random_bases", "matched_norm", "gora", "lora_xs"}


def combinations():
    """Method × base × variant where declared; every scaling on the linear types only."""
    for spec in list_initializers():
        for case in BASES:
            variants = VARIANTS if case.kind in KINDS else ("s=2", "rslora", "dora")
            if case.kind in spec.module_types:
                for variant in variants:
                    yield pytest.param(spec.name, case, variant, id=f"{spec.name}-{case}-{variant}")


COMBINATIONS = list(combinations())
# The scope lets all tests of one combination follow each other: they share a start.
every_combination = pytest.mark.parametrize(
    ("method", "case", "variant"),
    thinned(
        COMBINATIONS,
        lambda method, case, variant: method,
        lambda method, case, variant: (behavior(method), variant),
        lambda method, case, variant: (behavior(method), str(case)),
        lambda method, case, variant: (handling(method), str(case), variant == "dora"),
    ),
    scope="module",
)
# What follows a start is the layers' work, whatever formula gave the factors.
every_life = pytest.mark.parametrize(
    ("method", "case", "variant"), every_method_and_group(COMBINATIONS), scope="module"
)


def config_for(method, *, r=RANK, scaling="s=2", targets=tuple(SHAPES), **settings):
    """The method at uniform ranks, so that every layer has an adapter of rank r."""
    alpha, use_rslora = SCALINGS[scaling]
    return LoraConfig(
        r=r,
        lora_alpha=settings.pop("lora_alpha", alpha * r / RANK),
        use_rslora=use_rslora,
        target_modules=list(targets),
        init_lora_weights={"name": method, **uniform(method)},
        **settings,
    )


def adapt(method, base, *, seed=0, calibration=None, **settings):
    """`get_peft_model` with calibration data where the method needs them."""
    config = settings.pop("config", None) or config_for(method, **settings)
    if calibration is None:
        calibration = chain_calibration(next(base.parameters()).dtype)
    data = data_of(SPECS[method], calibration)
    return get_peft_model(base, config, seed=seed, calibration=data)


def adapt_case(method, case, variant, base, **arguments):
    """The same for one of `combinations`; `base` is changed."""
    spec = SPECS[method]
    return get_peft_model(
        base,
        config_for(method, targets=case.shapes, **VARIANTS[variant]),
        calibration=data_of(spec, case.calibration()),
        original_weights=case.originals() if spec.base == "replace" else None,
        **arguments,
    )


@functools.lru_cache(maxsize=4)
def started(method, case, variant):
    return adapt_case(method, case, variant, case.build())


def start(method, case, variant):
    """A model of one's own, as `adapt_case` makes it of a new base."""
    return copy.deepcopy(started(method, case, variant))


def layer_inputs(name, dtype):
    return chain_inputs(50, SHAPES[name][1], dtype, seed=21)


# -- step 0 ----------------------------------------------------------------------------------------


@every_combination
def test_factors_and_output_at_step_0(method, case, variant):
    base = case.build()
    model = start(method, case, variant)
    spec, plain = SPECS[method], kept_plain(base)
    assert list(model.layers) == list(case.shapes)
    for name, layer in model.layers.items():
        rows, columns = case.shapes[name]
        assert layer.module_type == case.kind
        assert layer.lora_A.shape == (RANK, columns)
        assert layer.lora_B.shape == (rows, RANK)
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
        assert layer.lora_A.isfinite().all()
        assert layer.lora_B.isfinite().all()
        assert layer.scaling == pytest.approx(EXPECTED_SCALINGS.get(variant, 2.0))
        assert layer.lora_A.requires_grad == ("lora_A" not in spec.frozen)
        assert layer.lora_B.requires_grad == ("lora_B" not in spec.frozen)
        assert not any(p.requires_grad for p in layer.base_layer.parameters())
        if variant == "dora":
            assert layer.lora_magnitude_vector.shape == (rows,)
            assert layer.lora_magnitude_vector.requires_grad
            assert torch.equal(layer.gain(), torch.ones(rows))
        else:
            assert layer.lora_magnitude_vector is None

        x = case.layer_inputs(name)
        module = plain.get_submodule(name)
        with torch.no_grad():
            actual, original = layer(x), module(x)
        assert actual.dtype == case.dtype
        assert actual.isfinite().all()
        if spec.preserves_output:
            tolerance = EPSILON[case.dtype] * norm_ratio(model, base, name)
            assert_gap(actual, original, tolerance, without_bias(module, x))


@pytest.mark.parametrize(("method", "kind"), across(PRESERVING, KINDS))
def test_float16_base(method, kind):
    dtype = torch.float16
    base = Chain(kind, dtype)
    model = adapt(method, copy.deepcopy(base))
    for name, layer in model.layers.items():
        x = layer_inputs(name, dtype)
        module = base.get_submodule(name)
        tolerance = EPSILON[dtype] * norm_ratio(model, base, name)
        assert_gap(layer(x), module(x), tolerance, without_bias(module, x))
    restored = model.unload()
    assert all(torch.equal(restored.state_dict()[k], v) for k, v in base.state_dict().items())


@pytest.mark.parametrize("method", one_of_each(PRESERVING))
def test_float64_base(method):
    """A base wider than the factors loses nothing but float32's rounding of the adapter's part."""
    base = Chain(dtype=torch.float64)
    model = adapt(method, copy.deepcopy(base))
    x = chain_inputs(20, dtype=torch.float64)
    assert model(x).dtype == torch.float64
    assert_gap(model(x), base(x), 3 * EPSILON[torch.float32] * largest_ratio(model, base))
    restored = model.unload().state_dict()
    for key, value in base.state_dict().items():
        torch.testing.assert_close(restored[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "scaling", "kind"),
    thinned(
        [(method, *others) for method in SUBTRACTING for others in product([256, 16], KINDS)],
        lambda method, scaling, kind: method,
        lambda method, scaling, kind: (behavior(method), scaling, kind),
    ),
)
def test_outlier_weights(method, scaling, kind):
    """One entry a hundred times the others' size, as some trained layers have.

    At s = 256 W - s B0 A0 is far larger than W: an edit could not be undone to 1e-6 of max |W|.
    """
    base = Chain(kind)
    with torch.no_grad():
        base.tall.weight[2, 1] = 100 * base.tall.weight.std()
    model = adapt(method, copy.deepcopy(base), lora_alpha=scaling * RANK)
    x = layer_inputs("tall", torch.float32)
    tolerance = EPSILON[torch.float32] * norm_ratio(model, base, "tall")
    assert_gap(model.layers["tall"](x), base.tall(x), tolerance, without_bias(base.tall, x))
    error = (model.unload().tall.weight - base.tall.weight).abs().max()
    assert error <= 1e-6 * base.tall.weight.abs().max()


@given(
    method=st.sampled_from(PRESERVING),
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 40),
    alpha=st.sampled_from([0.01, 0.5, 1.0, 7.0, 64.0]),
    use_rslora=st.booleans(),
    use_dora=st.booleans(),
    seed=st.integers(0, 3),
)
def test_output_at_step_0_for_any_shape(
    method, kind, rows, columns, rank, alpha, use_rslora, use_dora, seed
):
    spec = SPECS[method]
    assume(rank <= min(rows, columns))
    assume(spec.options().refuse_rank(rank, (rows, columns)) is None)
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(columns, rows) if kind == "Linear" else Conv1D(rows, columns))
    with torch.no_grad():
        weight = spread_weight(rows, columns)
        base[0].weight.copy_(weight if kind == "Linear" else weight.T)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=use_rslora,
        use_dora=use_dora,
        target_modules=["0"],
        init_lora_weights={"name": method, **uniform(method)},
    )
    x = chain_inputs(60, columns, seed=seed)
    calibration = data_of(spec, Batches([x]))
    model = get_peft_model(copy.deepcopy(base), config, calibration=calibration, seed=seed)
    tolerance = EPSILON[torch.float32] * norm_ratio(model, base, "0")
    assert_gap(model(x), base(x), tolerance, without_bias(base[0], x))
    restored = model.unload()
    error = (restored[0].weight - base[0].weight).abs().max()
    assert error <= 1e-6 * base[0].weight.abs().max()


# -- determinism -----------------------------------------------------------------------------------


def factors(model):
    return {
        f"{name}.{part}": getattr(layer, part).detach().clone()
        for name, layer in model.layers.items()
        for part in ("lora_A", "lora_B", "lora_core")
        if getattr(layer, part) is not None
    }


def assert_same(actual, expected):
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("method", "kind", "dtype"),
    thinned(
        [(method, *others) for method in METHODS for others in product(KINDS, DTYPES)],
        lambda method, kind, dtype: method,
        lambda method, kind, dtype: (handling(method), kind, dtype),
    ),
    ids=str,
)
def test_factors_depend_on_the_layer_and_the_seed_only(method, kind, dtype):
    """Not on the global generators, other targets, their order, or the ranks of other layers."""

    def start(**settings):
        base = Chain(kind, dtype)
        state = torch.get_rng_state()
        found = factors(adapt(method, base, **settings))
        assert torch.equal(torch.get_rng_state(), state)
        return found

    torch.manual_seed(1)
    together = start()
    torch.manual_seed(2)
    assert_same(start(targets=list(SHAPES)[::-1]), together)
    assert_same(start(targets=["tall"]), together)
    mixed = start(rank_pattern={"square": 8})
    assert_same({k: v for k, v in mixed.items() if "square" not in k}, together)
    if method in RANDOM:
        other = start(seed=1)
        assert not all(torch.equal(other[part], value) for part, value in together.items())


class TwoReaders(nn.Module):
    """Two layers that read one tensor, as q and k do."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)  # of the biases, on which gradients depend
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.q.weight.copy_(spread_weight(32, 32, generator))
            self.k.weight.copy_(spread_weight(16, 32, generator))

    def forward(self, x):
        return self.q(x), self.k(x)


@pytest.mark.parametrize("method", one_of_each(METHODS, behavior))
def test_factors_do_not_depend_on_readers_of_the_same_input(method):
    """Another layer of another rank reads the same input: exactly the same factors."""
    calibration = chain_calibration()
    alone = adapt(method, TwoReaders(), targets=["q"], calibration=calibration)
    for rank in (2, 8):
        both = adapt(
            method, TwoReaders(), targets=["q", "k"], rank_pattern={"k": rank},
            calibration=calibration,
        )  # fmt: skip
        assert_same(factors(alone), factors(both))


# -- the base comes back ---------------------------------------------------------------------------


@every_life
def test_disable_and_unload(method, case, variant):
    base = case.build()
    next(base.parameters()).requires_grad_(False)
    before, plain = snapshot(base), kept_plain(base)
    changed = copy.deepcopy(base)
    model = train(adapt_case(method, case, variant, changed, keep_original=True))
    x = case.inputs()
    trained, original = model(x), plain(x)
    assert relative_gap(trained, original) > 1e-4
    states = {layer.base_state for layer in model.layers.values()}

    with model.disable_adapter():
        for name, layer in model.layers.items():
            inputs = case.layer_inputs(name)
            module = plain.get_submodule(name)
            tolerance = EPSILON[torch.float32] if layer.base_state == "edited" else 0.0
            tolerance *= norm_ratio(model, base, name)
            assert_gap(layer(inputs), module(inputs), tolerance, without_bias(module, inputs))
    assert torch.equal(model(x), trained)

    restored = model.unload()
    assert restored is changed
    if "edited" not in states:
        assert_unchanged(restored, before | {"modules": snapshot(restored)["modules"]})
        assert torch.equal(restored(x), base(x))
    for name in case.shapes:
        weight = oriented_weight(base.get_submodule(name))
        error = (oriented_weight(restored.get_submodule(name)) - weight).abs().max()
        assert error <= 1e-6 * weight.abs().max()
    assert snapshot(restored)["flags"] == before["flags"]
    assert [type(m) for m in restored.modules()] == [type(m) for m in base.modules()]


@pytest.mark.parametrize(
    ("method", "case"),
    thinned(
        [(m, case) for m in REPLACING for case in BASES if case.kind in SPECS[m].module_types],
        lambda method, case: method,
        lambda method, case: str(case),
    ),
    ids=str,
)
def test_lost_original_is_refused_by_name(method, case):
    model = train(adapt_case(method, case, "s=2", case.build()))
    x = case.inputs()
    trained, names = model(x), [id(module) for module in model.modules()]
    first = next(iter(case.shapes))
    with (
        pytest.raises(RuntimeError, match=f"'{first}' was replaced.*no copy.*keep_original=True"),
        model.disable_adapter(),
    ):
        pass
    for call in (model.unload, model.delete_adapter):
        with pytest.raises(RuntimeError, match=f"'{first}' was replaced.*keep_original=True"):
            call()
    assert [id(module) for module in model.modules()] == names
    assert torch.equal(model(x), trained)


@pytest.mark.parametrize("method", one_of_each(SUBTRACTING))
def test_disabled_adapter_of_low_precision_computes_the_original(method):
    """Factors in bfloat16 are the user's choice; the original function is not to suffer for it."""
    base = Chain()
    model = get_peft_model(
        copy.deepcopy(base),
        config_for(method),
        calibration=data_of(SPECS[method], chain_calibration()),
        adapter_dtype=torch.bfloat16,
    )
    x = chain_inputs(30)
    with model.disable_adapter():
        assert_gap(model(x), base(x), 3 * EPSILON[torch.float32] * largest_ratio(model, base))


@pytest.mark.parametrize("method", ["pissa", "kaiming"])
def test_contexts_nest(method):
    base = Chain()
    model = train(adapt(method, copy.deepcopy(base)))
    x = chain_inputs(20)
    trained = model(x)
    with model.disable_adapter():
        disabled = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), disabled)
        assert torch.equal(model(x), disabled)
    assert torch.equal(model(x), trained)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError("the user's own")
    assert torch.equal(model(x), trained)


@pytest.mark.parametrize("method", one_of_each(METHODS, behavior))
def test_training_modes_stay_as_they_were(method):
    """A part that its owner keeps in eval mode is not switched on by an adapter."""
    base = Chain().train()
    base.frozen = nn.Sequential(nn.Dropout(0.5)).eval()
    model = adapt(method, base)
    assert model.training
    assert model.layers["tall"].training
    assert not base.frozen.training
    assert not base.frozen[0].training
    assert not adapt(method, Chain().eval()).training


@pytest.mark.parametrize(("method", "dtype"), across(METHODS, DTYPES), ids=str)
@pytest.mark.filterwarnings("ignore:lora_dropout=0.5 with")
def test_dropout_acts_in_training_only(method, dtype):
    base = Chain(dtype=dtype)
    plain = train(adapt(method, copy.deepcopy(base)))
    model = train(adapt(method, copy.deepcopy(base), lora_dropout=0.5))
    x = chain_inputs(20, dtype=dtype)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    if SPECS[method].base != "replace":
        with model.disable_adapter():
            assert torch.equal(model(x), model(x))


# Of a merged weight that is packed again: 0.09 of its norm under NF4, 0.01 under int8.
PACKING_ERROR = {"Linear4bit": 0.2, "Linear8bitLt": 0.03}


@every_life
@pytest.mark.filterwarnings("ignore:merged into")
def test_merge_unmerge_and_unload(method, case, variant):
    base = case.build()
    model = train(start(method, case, variant))
    ratios = {name: norm_ratio(model, base, name) for name in model.layers}
    inputs = {name: case.layer_inputs(name) for name in model.layers}
    with torch.no_grad():
        expected = {name: layer(inputs[name]) for name, layer in model.layers.items()}

    def assert_same_function(modules):
        for name, output in expected.items():
            scale = without_bias(base.get_submodule(name), inputs[name])
            tolerance = EPSILON[case.dtype] * ratios[name]
            assert_gap(
                modules[name](inputs[name]), output, PACKING_ERROR.get(case.kind, tolerance), scale
            )

    before = snapshot(model.base_model)
    model.merge_adapter()
    assert_same_function(model.layers)
    model.unmerge_adapter()
    assert_unchanged(model.base_model, before)
    for name, output in expected.items():
        assert torch.equal(model.layers[name](inputs[name]), output)

    model.merge_adapter()
    merged = model.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in merged.named_parameters()}
    assert merged.state_dict().keys() == base.state_dict().keys()
    for name, weight in merged.state_dict().items():
        assert weight.dtype == base.state_dict()[name].dtype
    assert_same_function(dict(merged.named_modules()))


# -- the adapter is active -------------------------------------------------------------------------


@every_life
def test_every_trainable_part_learns(method, case, variant):
    model = start(method, case, variant).eval()
    spec = SPECS[method]
    parts = {"lora_A", "lora_B"} - set(spec.frozen) | ({"lora_core"} if spec.has_core else set())
    if variant == "dora":
        parts.add("lora_magnitude_vector")
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == {
        f"base_model.{name}.{part}" for name in case.shapes for part in parts
    }

    def gradients():
        model.zero_grad()
        model(case.inputs()).float().pow(2).sum().backward()
        return {name: p.grad for name, p in trainable.items()}

    with torch.no_grad():
        model(case.inputs())  # an evaluation, which repacks 4-bit weights that are let
    first = gradients()
    for name in case.shapes:
        found = [first[f"base_model.{name}.{part}"] for part in parts]
        assert any(g is not None and g.abs().max() > 0 for g in found), f"{name} cannot learn"
    train(model)  # where a factor was zero, the other had no gradient
    for name, gradient in gradients().items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trainable)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("method", one_of_each(METHODS))
def test_a_parent_that_bypasses_forward_is_supported_or_refused(method):
    """nn.TransformerEncoderLayer's fused path reads `linear1.weight` and never calls linear1.

    The path is taken in eval mode, which is where a trained adapter is evaluated.
    """
    base = Encoder().eval()
    x = torch.randn(3, 5, 32)
    targets = ["linear1", "linear2"]
    try:
        model = adapt(method, copy.deepcopy(base), targets=targets, calibration=Batches([x])).eval()
    except (TypeError, ValueError) as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert "linear1" in refusal
        return
    with torch.no_grad():
        if SPECS[method].preserves_output:
            assert_gap(model(x), base(x), 3 * EPSILON[torch.float32] * largest_ratio(model, base))
        train(model, size=0.5)
        evaluated = model(x)
        model.train()
        assert_gap(evaluated, model(x), 1e-5)


# -- files -----------------------------------------------------------------------------------------


@every_life
def test_save_and_load(method, case, variant, tmp_path):
    base = case.build()
    spec = SPECS[method]
    model = train(start(method, case, variant))
    originals = case.originals() if spec.base == "replace" else None
    x = case.inputs()
    expected = model(x)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = LoraModel.from_pretrained(
            copy.deepcopy(base), tmp_path, original_weights=originals
        )
    tolerance = 1e-5 * largest_ratio(model, base) if spec.base == "subtract" else 0.0
    assert_gap(loaded(x), expected, tolerance)
    for name, layer in loaded.layers.items():
        saved = model.layers[name]
        assert torch.equal(layer.lora_A, saved.lora_A)
        assert torch.equal(layer.lora_B, saved.lora_B)
        if variant == "dora":
            assert torch.equal(layer.lora_magnitude_vector, saved.lora_magnitude_vector)
        assert layer.rank == RANK
        assert layer.base_state == saved.base_state
        assert layer.scaling == pytest.approx(saved.scaling)
        assert layer.lora_A.requires_grad == ("lora_A" not in spec.frozen)
        assert layer.lora_B.requires_grad == ("lora_B" not in spec.frozen)

    if variant not in ("s=2", "dora"):
        return
    # What was loaded can be trained, saved and loaded again. The scaling has no part in that: the
    # loaded model is the saved one, at each of them, and the second file is made like the first.
    again = tmp_path / "again"
    train(loaded, seed=6).save_pretrained(again)
    twice = LoraModel.from_pretrained(copy.deepcopy(base), again, original_weights=originals)
    assert_gap(twice(x), loaded(x), tolerance)


@pytest.mark.parametrize("method", one_of_each(RESTORABLE, behavior))
def test_saved_adapter_loads_onto_the_unloaded_base(method, tmp_path):
    """Load -> unload -> load on one model: its base still counts as the same one."""
    for seed in range(3):
        base = Chain(seed=seed)
        model = train(adapt(method, base))
        x = chain_inputs(30)
        expected = model(x)
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = LoraModel.from_pretrained(model.unload(), tmp_path)
        assert_gap(loaded(x), expected, 1e-5 * largest_ratio(loaded, Chain(seed=seed)))


def test_loftq_loads_onto_a_base_that_another_method_gave_back(tmp_path):
    """An unloaded float32 base differs in its last bits; it still counts as the same base."""
    for seed in range(3):
        base = Chain(seed=seed)
        model = train(adapt("loftq", copy.deepcopy(base)))
        expected = model(chain_inputs(30))
        model.save_pretrained(tmp_path)
        restored = adapt("pissa", copy.deepcopy(base)).unload()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some codes may differ
            loaded = LoraModel.from_pretrained(restored, tmp_path)
        assert_gap(loaded(chain_inputs(30)), expected, 1e-2)


@pytest.mark.parametrize(("method", "dtype"), across(RESTORABLE, DTYPES), ids=str)
def test_another_base_is_noticed(method, dtype, tmp_path):
    adapt(method, Chain(dtype=dtype)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="is not the one the adapter was trained on"):
        LoraModel.from_pretrained(Chain(dtype=dtype, seed=1), tmp_path)


@every_life
def test_checkpoint_continues_a_run(method, case, variant):
    model = train(start(method, case, variant))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = case.inputs()
    resumed = adapt_case(method, case, variant, case.build())
    resumed.load_state_dict(state)
    assert torch.equal(resumed(x), model(x))


# -- refusals leave the model alone ----------------------------------------------------------------


@pytest.mark.parametrize(("method", "kind"), across(METHODS, KINDS, group=behavior))
def test_rank_above_the_layer_is_refused(method, kind):
    """Methods that only draw have no limit, because they decompose nothing."""
    base = Chain(kind)
    before = snapshot(base)
    if not SPECS[method].needs:
        assert adapt(method, base, r=26, targets=["wide"]).layers["wide"].lora_A.shape[0] == 26
        return
    with pytest.raises(ValueError, match=r"'wide'.*rank 26 exceeds min\(out, in\) = 24"):
        adapt(method, base, r=26, targets=["wide"])
    with pytest.raises(ValueError, match=r"'tall'.*rank 34 exceeds min\(out, in\) = 32"):
        adapt(method, base, rank_pattern={"tall": 34})
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    ("method", "kind"),
    thinned(
        list(product(METHODS, KINDS)),
        lambda method, kind: method,
        lambda method, kind: (handling(method), kind),
    ),
)
def test_full_rank_is_supported(method, kind):
    options, base = SPECS[method].options(), Chain(kind)
    rank = 24 if options.refuse_rank(24, SHAPES["wide"]) is None else 12
    model = adapt(method, copy.deepcopy(base), r=rank, scaling="s=1")
    assert all(layer.rank == rank for layer in model.layers.values())
    x = chain_inputs(30)
    if SPECS[method].preserves_output:
        assert_gap(model(x), base(x), 3 * EPSILON[torch.float32] * largest_ratio(model, base))


class Unsupported(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.picture = nn.Conv2d(3, 16, 3)
        self.both = nn.Bilinear(4, 4, 8)
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    ("method", "target", "kind"),
    [
        (spec.name, target, kind)
        for spec in list_initializers()
        for target, kind in (("words", "Embedding"), ("picture", "Conv2d"), ("both", "Bilinear"))
        if kind not in spec.module_types
    ],
)
def test_unsupported_module_type_is_refused_by_name(method, target, kind):
    base = Unsupported()
    before = snapshot(base)
    message = rf"'{target}' is a {kind}.*{method} does not support.*Linear.*Leave it out with excl"
    with pytest.raises(TypeError, match=message):
        adapt(method, base, targets=["linear", target], calibration=[torch.randn(4, 16)])
    assert_unchanged(base, before)


@pytest.mark.parametrize(("method", "kind"), across(RESTORABLE, KINDS))
def test_failure_in_the_middle_leaves_the_model_unchanged(method, kind, monkeypatch):
    """The third of three layers cannot be wrapped: the machine fails, not the configuration."""
    create, calls = LoraLayer.__init__, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no more")
        create(*args, **kwargs)

    base = Chain(kind)
    before = snapshot(base)
    monkeypatch.setattr(LoraLayer, "__init__", failing)
    with pytest.raises(MemoryError, match="no more"):
        adapt(method, base)
    assert_unchanged(base, before)


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo):
        raise MemoryError("no more")


@pytest.mark.parametrize("method", one_of_each(RESTORABLE))
def test_failing_copy_of_a_module_to_save_leaves_the_model_unchanged(method):
    base = Chain()
    base.head = Uncopyable(4, 4)
    before = snapshot(base)
    with pytest.raises(MemoryError, match="no more"):
        adapt(method, base, modules_to_save=["head"])
    assert_unchanged(base, before)


@pytest.mark.parametrize("method", one_of_each(SUBTRACTING, behavior))
def test_failing_write_leaves_the_model_unchanged(method):
    """A weight made under inference_mode cannot be written to afterwards."""
    base = Chain()
    calibration = chain_calibration()
    with torch.inference_mode():
        base.wide = nn.Linear(56, 24)
    before = snapshot(base)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        adapt(method, base, calibration=calibration)
    assert_unchanged(base, before)


@pytest.mark.parametrize("method", one_of_each(WITH_DATA, behavior))
def test_failing_calibration_leaves_the_model_unchanged(method):
    base = Chain().train()
    before = snapshot(base)

    def broken():
        yield chain_inputs(20)
        raise OSError("the disk is gone")

    for calibration, error, message in (
        (None, ValueError, "needs calibration data"),
        ([], ValueError, "no batch"),
        (Batches([torch.full((4, 32), float("nan"))]), ValueError, "'square' are not finite|nan"),
        (WithLoss(broken(), Batches.loss), OSError, "the disk is gone"),
    ):
        data = data_of(SPECS[method], calibration)
        with pytest.raises(error, match=message):
            get_peft_model(base, config_for(method), calibration=data)
        assert_unchanged(base, before)


@pytest.mark.parametrize(
    ("method", "value"),
    across(
        [name for name, spec in SPECS.items() if spec.reads & {"weight", "gradient"}],
        [float("inf"), float("nan")],
        group=behavior,
    ),
)
def test_weight_that_is_not_finite_is_refused_by_name(method, value):
    base = Chain()
    calibration = chain_calibration()
    before = snapshot(base)
    kept = base.wide.weight[0, 0].item()
    with torch.no_grad():
        base.wide.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"'wide'.*NaN or infinite"):
        adapt(method, base, calibration=calibration)
    with torch.no_grad():
        base.wide.weight[0, 0] = kept  # NaN differs from itself
    assert_unchanged(base, before)


@pytest.mark.parametrize("method", one_of_each(SUBTRACTING, behavior))
def test_computed_weight_is_refused_by_name(method):
    """A parametrized weight is computed again at every call: an edit of it would be lost."""
    base = Chain()
    nn.utils.parametrizations.weight_norm(base.tall)
    with pytest.raises((TypeError, ValueError), match="'tall'"):
        adapt(method, base)


@pytest.mark.parametrize("method", one_of_each(METHODS))
def test_second_adapter_is_refused(method):
    model = adapt(method, Chain())
    before = snapshot(model)
    for second in (model, model.base_model):
        with pytest.raises(ValueError, match=r"has an adapter already.*unload\(\)"):
            adapt(method, second)
    assert_unchanged(model, before)


@every_method
def test_dry_run_changes_nothing(method):
    base = Chain()
    before = snapshot(base)
    plan = get_peft_model(base, config_for(method), dry_run=True)
    assert_unchanged(base, before)
    assert [target.name for target in plan.targets] == list(SHAPES)
    assert [target.rank for target in plan.targets] == [RANK] * 3
    assert plan.parameters <= RANK * sum(sum(shape) for shape in SHAPES.values())
    assert (plan.calibration is not None) == (SPECS[method].needs_data)
    printed = str(plan)
    assert method in printed
    for name, (rows, columns) in SHAPES.items():
        assert name in printed
        assert f"{rows}×{columns}" in printed
