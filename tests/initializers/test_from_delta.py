"""from_delta: the best rank-r part of a difference, and the sources of the second weight."""

import copy

import peft
import pytest
import torch
from layers import layer_of, product
from measures import assert_gap, assert_unchanged, relative_gap, snapshot, train
from models import spread_weight
from networks import SHAPES, Chain, chain_inputs
from safetensors.torch import save_file

from lora_init import LoraConfig, get_peft_model, init_factors, initialize_peft_model
from lora_init.adapters.second_adapter import second_weights
from lora_init.initializers.from_delta import FromDeltaOptions, from_delta
from lora_init.registry import get_initializer
from lora_init.weights.kinds import oriented_weight

RANK = 4
TARGETS = list(SHAPES)


def factors_of(weight, other, rank=RANK, scaling=2.0, **options):
    layer = layer_of(weight, rank, scaling, target_weight=other)
    return from_delta(layer, FromDeltaOptions(**options))


def best(matrix, rank=RANK):
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def config_for(method="from_delta", targets=TARGETS, **settings):
    return LoraConfig(r=RANK, target_modules=targets, init_lora_weights=method, **settings)


# -- the formula -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scaling", [1.0, 2.0, 5.66, 16.0])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 40, 4), (56, 24, 24), (24, 56, 4)])
def test_is_the_best_part_of_the_difference(rows, columns, rank, scaling, dtype):
    weight = spread_weight(rows, columns).to(dtype)
    other = (weight.float() + 0.1 * spread_weight(rows, columns)).to(dtype)
    difference = other.double() - weight.double()
    factors = factors_of(weight, other, rank, scaling)
    assert relative_gap(product(factors, scaling), best(difference, rank)) < 1e-4
    values = torch.linalg.svdvals(difference)
    for gram in (factors.lora_A @ factors.lora_A.T, factors.lora_B.T @ factors.lora_B):
        torch.testing.assert_close(
            gram.double(), torch.diag(values[:rank] / scaling), rtol=1e-3, atol=1e-4
        )
    left = (difference - product(factors, scaling)).square().sum()
    assert float(left) == pytest.approx(float(values[rank:].square().sum()), rel=1e-3, abs=1e-8)
    share = float(values[:rank].square().sum() / values.square().sum())
    assert float(factors.metrics["kept_share"]) == pytest.approx(share, rel=1e-4)


def test_a_difference_of_lower_rank_is_recovered_and_the_rest_can_learn():
    weight = spread_weight(40, 30)
    difference = 0.1 * spread_weight(40, 2) @ spread_weight(2, 30)
    for change, lost in ((difference, 2), (torch.zeros(40, 30), 4)):
        other = weight.double() + change.double()
        factors = factors_of(weight, other)
        assert int(factors.metrics["vanishing_components"]) == lost
        assert (product(factors) - change.double()).norm() <= 1e-5 * change.norm()
        filled = factors.lora_A[RANK - lost :]
        assert float(filled.abs().max()) <= 30**-0.5
        assert float(filled.abs().mean()) == pytest.approx(0.5 * 30**-0.5, rel=0.3)
        assert not factors.lora_B[:, RANK - lost :].any()


def test_directions_alone():
    weight, other = spread_weight(40, 30), spread_weight(40, 30)
    factors = factors_of(weight, other, form="directions")
    right = torch.linalg.svd(other.double() - weight.double())[2][:RANK]
    assert relative_gap(factors.lora_A.T @ factors.lora_A, right.T @ right) < 1e-4
    assert not factors.lora_B.any()


# -- sources ---------------------------------------------------------------------------------------


def checkpoint(folder, kind="Linear"):
    """A second checkpoint of the same network, in its own layout, and its network."""
    other = Chain(kind, seed=1)
    save_file(other.state_dict(), folder / "model.safetensors")
    return other


@pytest.mark.parametrize("method", ["from_delta", "from_delta_subtracted"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_a_checkpoint(kind, method, tmp_path):
    base, other = Chain(kind), checkpoint(tmp_path, kind)
    for source in (tmp_path, other.state_dict()):
        model = get_peft_model(copy.deepcopy(base), config_for(method), target_weights=source)
        for name, layer in model.layers.items():
            first, second = (oriented_weight(m.get_submodule(name)) for m in (base, other))
            expected = best(second.double() - first.double())
            assert relative_gap(product(layer, layer.scaling), expected) < 1e-4
            if method == "from_delta_subtracted":
                left = first.double() - expected
                assert relative_gap(oriented_weight(layer.base_layer), left) < 1e-5
        details = model.init_report().layers[0].details
        assert 0 < details["kept_share"] < 1
        assert details["change"] > 0


def test_a_model_at_the_rank_of_the_difference_is_the_second_model(tmp_path):
    """A difference of rank 4 in every layer, and a factor of 4: the same outputs."""
    base = Chain()
    other = copy.deepcopy(base)
    with torch.no_grad():
        for name, (rows, columns) in SHAPES.items():
            change = spread_weight(rows, RANK) @ spread_weight(RANK, columns)
            other.get_submodule(name).weight += 0.05 * change
    model = get_peft_model(base, config_for(), target_weights=other.state_dict())
    x = chain_inputs(20)
    assert_gap(model(x), other(x), 1e-4)


@pytest.mark.parametrize("method", ["kaiming", "pissa"])
def test_an_adapter_of_ours(method, tmp_path):
    """Its whole difference from the base, also where it subtracts its start."""
    base = Chain()
    trained = train(get_peft_model(copy.deepcopy(base), config_for(method)))
    trained.save_pretrained(tmp_path)
    x = chain_inputs(20)
    settings = config_for(targets=["tall"]) if method == "kaiming" else config_for()
    settings.r = 2 * RANK
    model = get_peft_model(copy.deepcopy(base), settings, target_weights=tmp_path)
    for name, layer in model.layers.items():
        before = trained.layers[name]
        change = before.scaling * before.lora_B.double() @ before.lora_A.double()
        if method == "pissa":
            start = before.initial_lora_B.double() @ before.initial_lora_A.double()
            change -= before.scaling * start
        assert relative_gap(product(layer, layer.scaling), change) < 1e-5
    if method == "pissa":
        assert_gap(model(x), trained(x), 1e-4)
    else:
        assert model.init_report().layers[0].details["vanishing_components"] == RANK


def test_an_adapter_of_pefts(tmp_path):
    base = Chain()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=RANK, target_modules=TARGETS)
    )
    train(theirs).save_pretrained(tmp_path)
    model = get_peft_model(copy.deepcopy(base), config_for(), target_weights=str(tmp_path))
    x = chain_inputs(20)
    assert_gap(model(x), theirs(x), 1e-4)


def test_under_peft(tmp_path):
    base, _ = Chain(), checkpoint(tmp_path)
    wrapped = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=RANK, target_modules=TARGETS)
    )
    initialize_peft_model(wrapped, "from_delta", target_weights=tmp_path)
    ours = get_peft_model(base, config_for(), target_weights=tmp_path)
    for name, layer in ours.layers.items():
        theirs = wrapped.base_model.model.get_submodule(name)
        assert torch.equal(theirs.lora_A["default"].weight, layer.lora_A)


# -- refusals --------------------------------------------------------------------------------------


def without(state, name):
    return {key: value for key, value in state.items() if key != f"{name}.weight"}


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "tall"), r"target_weights: .* no weight for 'tall'"),
        (
            lambda state: state | {"tall.weight": torch.zeros(56, 31)},
            r"target_weights: the weight of 'tall' is \(56, 31\) .* and \(56, 32\) in the model",
        ),
        (
            lambda state: state | {"tall.weight": torch.full((56, 32), float("nan"))},
            r"target_weights of tall.*NaN or infinite",
        ),
        (lambda state: "nowhere", r"target_weights: no file or folder 'nowhere'"),
        pytest.param(
            lambda state: 5, r"target_weights is of type int", marks=pytest.mark.wrong_types
        ),
    ],
)
def test_a_source_that_does_not_fit_is_refused(change, message):
    base = Chain()
    before = snapshot(base)
    source = change(Chain(seed=1).state_dict())
    with pytest.raises((ValueError, FileNotFoundError, TypeError), match=message):
        get_peft_model(base, config_for(), target_weights=source)
    assert_unchanged(base, before)


def test_an_adapter_that_is_no_low_rank_change_is_refused(tmp_path):
    base = Chain()
    for method, settings, message in (
        ("kaiming", {"use_dora": True}, "it uses DoRA"),
        ("loftq", {}, "it replaces the base"),
        ("kaiming", {"targets": ["tall"]}, "the adapter has nothing for 'square'"),
    ):
        folder = tmp_path / message
        get_peft_model(copy.deepcopy(base), config_for(method, **settings)).save_pretrained(folder)
        with pytest.raises(ValueError, match=message):
            get_peft_model(copy.deepcopy(base), config_for(), target_weights=folder)


def test_second_weights_are_asked_for_and_refused_by_name():
    base = Chain()
    with pytest.raises(ValueError, match=r"'from_delta' needs a second weight.*target_weights="):
        second_weights(base, None, get_initializer("from_delta"))
    with pytest.raises(ValueError, match=r"target_weights is not supported with .*'pissa'"):
        get_peft_model(base, config_for("pissa"), target_weights=base.state_dict())
    weight = torch.randn(6, 5)
    for wrong in (None, torch.randn(5, 6)):
        with pytest.raises(ValueError, match=r"target_weight=.* must be a .*tensor \(6, 5\)"):
            init_factors(weight, "from_delta", r=2, target_weight=wrong)
    with pytest.raises(ValueError, match=r"from_delta: form='x' .* product, directions"):
        init_factors(weight, {"name": "from_delta", "form": "x"}, r=2, target_weight=weight)
