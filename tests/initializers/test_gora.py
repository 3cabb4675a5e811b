"""gora: ranks by hand, and B by a float64 pseudo-inverse and by autograd."""

import copy
import math

import pytest
import torch
from layers import layer_of
from losses import mean_gradients, mean_square
from measures import relative_gap
from networks import SHAPES, Chain, chain_inputs

from lora_init import LoraConfig, WithLoss, calibrate, get_peft_model
from lora_init.initializers.gora import GoraOptions, gora
from lora_init.layer import LayerRequest, LayerStatistics
from lora_init.weights.kinds import oriented_weight

RANK = 4
GAMMA = 0.05
SCALINGS = {  # alpha, use_rslora
    1 / 16: (RANK / 16, False),
    1.0: (RANK, False),
    16.0: (16 * RANK, False),
    8.0: (16, True),
}


def factors_of(gradient, rank=RANK, scaling=2.0, **options):
    weight = torch.empty(gradient.shape, device="meta")  # only the allocation reads it
    return gora(layer_of(weight, rank, scaling, gradient=gradient), GoraOptions(**options))


def projected_step(gradient, lora_A, gamma=GAMMA):
    """-gamma sqrt(in / r) G A⁺ A."""
    gradient, lora_A = gradient.double(), lora_A.double()
    rank, columns = lora_A.shape
    return -gamma * math.sqrt(columns / rank) * gradient @ torch.linalg.pinv(lora_A) @ lora_A


def request(rank, shape, importance):
    """A layer whose mean |W ∘ G| is `importance`."""
    weight = torch.full(shape, -2.0)
    gradient = torch.full(shape, importance / 2)
    return LayerRequest(rank, shape, LayerStatistics(gradient=gradient), lambda: weight)


# -- ranks -----------------------------------------------------------------------------------------


def test_ranks_are_shares_of_the_budget():
    requests = {
        "a": request(8, (60, 40), 3.0),
        "b": request(8, (60, 40), 1.0),
        "c": request(8, (300, 100), 2.0),
    }
    lengths = {"a": 10.0, "b": 10.0, "c": 20.0}
    budget = 8 * (10 + 10 + 20)
    expected = {
        name: round(budget * share / 6 / lengths[name])
        for name, share in (("a", 3), ("b", 1), ("c", 2))
    }
    assert expected == {"a": 16, "b": 5, "c": 5}
    assert GoraOptions().allocate(requests) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"a": 16, "b": 2}),  # four times, half
        ({"smallest": 0.3}, {"a": 16, "b": 2}),  # 1.2, rounded up
        ({"smallest": 0.0}, {"a": 16, "b": 0}),
        ({"largest": 1.6, "smallest": 1.0}, {"a": 6, "b": 4}),
        ({"largest": 1.0, "smallest": 1.0}, {"a": 4, "b": 4}),
        ({"largest": 100.0}, {"a": 30, "b": 2}),  # as many as it has rows
    ],
)
def test_ranks_keep_within_their_bounds(options, expected):
    layers = {"a": request(4, (30, 70), 1e3), "b": request(4, (70, 30), 1e-3)}
    large = {f"other{index}": request(4, (70, 30), 0.0) for index in range(9)}
    ranks = GoraOptions(**options).allocate(layers | large)
    assert {name: ranks[name] for name in layers} == expected


def test_a_layer_without_a_gradient_keeps_the_least():
    layers = {"a": request(4, (30, 30), 1.0), "b": request(4, (30, 30), 0.0)}
    assert GoraOptions().allocate(layers) == {"a": 8, "b": 2}
    with pytest.raises(ValueError, match="gora: the loss has no gradient in any target"):
        GoraOptions().allocate({"b": layers["b"]})


# -- factors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rank", [1, RANK, 24])
@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (56, 24), (24, 56)])
def test_the_product_is_a_step_within_the_rows_of_a(rows, columns, rank, scaling):
    gradient = 1e-4 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    factors = factors_of(gradient, rank, scaling)
    product = scaling * factors.lora_B.double() @ factors.lora_A.double()
    assert relative_gap(product, projected_step(gradient, factors.lora_A)) < 1e-5
    assert factors.lora_A.abs().max() <= columns**-0.5
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32


def test_the_step_is_as_long_as_gamma_says():
    gradient = torch.randn(300, 400, generator=torch.Generator().manual_seed(1))
    for rank in (4, 16):
        factors = factors_of(gradient, rank, scaling=0.5, gamma=0.2)
        length = (0.5 * factors.lora_B @ factors.lora_A).norm() / gradient.norm()
        assert float(length) == pytest.approx(0.2, rel=0.1)


# -- from data to model ----------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_end_to_end(kind, dtype, scaling):
    """Gradients and weights are the layer's own, in the right orientation; so are the ranks."""
    base = Chain(kind, dtype)
    batches = [chain_inputs(rows, dtype=dtype, seed=rows) for rows in (30, 10)]
    alpha, use_rslora = SCALINGS[scaling]
    config = LoraConfig(
        r=RANK, lora_alpha=alpha, use_rslora=use_rslora, target_modules=list(SHAPES),
        init_lora_weights="gora",
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), config, calibration=WithLoss(batches, mean_square))
    gradients = mean_gradients(base, batches)
    scores = {
        name: float((oriented_weight(base.get_submodule(name)).double() * gradient).abs().mean())
        for name, gradient in gradients.items()
    }
    total = sum(scores.values())
    budget = sum(RANK * math.sqrt(sum(shape)) for shape in SHAPES.values())
    for name, layer in model.layers.items():
        rank = round(scores[name] / total * budget / math.sqrt(sum(SHAPES[name])))
        assert layer.rank == max(RANK // 2, min(rank, 4 * RANK)), name
        assert layer.scaling == pytest.approx(scaling)
        product = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2  # of the gradient itself
        expected = projected_step(gradients[name], layer.lora_A)
        assert relative_gap(product, expected) < tolerance, name
        original = oriented_weight(base.get_submodule(name))
        assert torch.equal(oriented_weight(layer.base_layer), original)
    assert len({layer.rank for layer in model.layers.values()}) > 1


def test_the_start_is_a_step_down():
    base, batches = Chain(), [chain_inputs(30, seed=3)]
    config = LoraConfig(r=RANK, target_modules=list(SHAPES), init_lora_weights="gora")
    data = WithLoss(batches, mean_square)
    model = get_peft_model(copy.deepcopy(base), config, calibration=data)
    with torch.no_grad():
        assert mean_square(model, batches[0]) < mean_square(base, batches[0])


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("gamma", 0, "> 0"), ("gamma", -1.0, "> 0"), ("gamma", math.nan, "> 0"),
        ("gamma", True, "> 0"), ("smallest", -0.1, ">= 0"), ("largest", math.inf, ">= 0"),
    ],
)  # fmt: skip
def test_a_bad_number_is_refused(name, value, limit):
    with pytest.raises(ValueError, match=f"gora: {name}=.*must be a finite number {limit}"):
        LoraConfig(init_lora_weights={"name": "gora", name: value})


@pytest.mark.parametrize("options", [{"smallest": 1.5}, {"largest": 0.5}])
def test_bounds_that_exclude_the_planned_rank_are_refused(options):
    with pytest.raises(ValueError, match="gora: smallest=.*smallest <= 1 <= largest"):
        LoraConfig(init_lora_weights={"name": "gora", **options})


def test_a_weight_that_is_not_finite_is_named():
    base = Chain()
    model = Chain()
    with torch.no_grad():
        model.tall.weight[3, 3] = torch.nan
    config = LoraConfig(r=RANK, target_modules=list(SHAPES), init_lora_weights="gora")
    found = calibrate(base, config, WithLoss([chain_inputs(30)], mean_square))
    with pytest.raises(ValueError, match="target 'tall': its weight holds NaN"):
        get_peft_model(model, config, calibration=found)
