"""lora_one: one step along the gradient, by full SVDs in float64 and by autograd."""

import copy

import pytest
import torch
from layers import layer_of, product, settings_of_scalings
from losses import mean_square
from measures import relative_gap
from networks import Chain, chain_inputs

from lora_init import LoraConfig, WithLoss, get_peft_model
from lora_init.initializers.lora_one import LoraOneOptions, lora_one

RANK = 4
GAMMA = 128.0
TEXT = pytest.param("128", marks=pytest.mark.wrong_types)
SHAPES = [(40, 40), (56, 24), (24, 56)]
SCALINGS = settings_of_scalings(RANK)


def factors_of(gradient, rank=RANK, scaling=2.0, seed=0, **options):
    layer = layer_of(gradient, rank, scaling, seed=seed, gradient=gradient)
    return lora_one(layer, LoraOneOptions(**options))


def step(gradient, scaling=2.0, rank=RANK, gamma=GAMMA):
    """s / (gamma S_1) times the best rank-r approximation of -G."""
    left, values, right = torch.linalg.svd(-gradient.double(), full_matrices=False)
    return scaling / (gamma * values[0]) * (left[:, :rank] * values[:rank]) @ right[:rank]


def steep(rows, columns, decay=0.8, size=1e-4):
    """A gradient: small, and of singular values that fall by a factor each."""
    count = min(rows, columns)
    generator = torch.Generator().manual_seed(rows)
    left, right = (
        torch.linalg.qr(torch.randn(n, count, generator=generator, dtype=torch.float64))[0]
        for n in (rows, columns)
    )
    values = size * decay ** torch.arange(count, dtype=torch.float64)
    return ((left * values) @ right.T).float()


# -- factors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_product_is_a_step_cut_to_rank_r(rows, columns, scaling):
    gradient = steep(rows, columns)
    factors = factors_of(gradient, scaling=scaling)
    assert relative_gap(product(factors, scaling), step(gradient, scaling)) < 1e-5
    largest = torch.linalg.svdvals(product(factors, scaling))[0]
    assert float(largest) == pytest.approx(scaling / GAMMA)


@pytest.mark.parametrize("gamma", [16, 128.0, 1e4])
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (400, 320)])
def test_factors_are_balanced(rows, columns, gamma):
    gradient = steep(rows, columns)
    factors = factors_of(gradient, gamma=gamma)
    values = torch.linalg.svdvals(gradient.double())[:RANK]
    expected = (values / values[0] / gamma).diag()
    lora_A, lora_B = factors.lora_A.double(), factors.lora_B.double()
    assert relative_gap(lora_A @ lora_A.T, expected) < 1e-4
    assert relative_gap(lora_B.T @ lora_B, expected) < 1e-4
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32


def test_the_size_of_the_gradient_does_not_matter():
    small, large = factors_of(steep(24, 56, size=1e-9)), factors_of(steep(24, 56, size=1e3))
    assert relative_gap(product(small), product(large)) < 1e-5


def test_a_gradient_of_lower_rank():
    gradient = steep(24, 56, decay=0.5)[:, :3] @ steep(56, 24, decay=0.5)[:3]
    factors = factors_of(gradient)
    assert relative_gap(product(factors), step(gradient)) < 1e-5
    assert int(factors.metrics["vanishing_components"]) == 1
    none = factors_of(torch.zeros(24, 24))
    assert not none.lora_A.any()
    assert not none.lora_B.any()


# -- from data to model ----------------------------------------------------------------------------


def loss_of(model, batches):
    with torch.no_grad():
        return float(sum(mean_square(model, batch) for batch in batches))


def test_the_start_is_a_step_down():
    base = Chain()
    batches = [chain_inputs(30, seed=3)]
    losses = [loss_of(base, batches)]
    for gamma in (128.0, 16.0):
        config = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=["square", "tall", "wide"],
            init_lora_weights={"name": "lora_one", "gamma": gamma},
        )  # fmt: skip
        data = WithLoss(batches, mean_square)
        losses.append(
            loss_of(get_peft_model(copy.deepcopy(base), config, calibration=data), batches)
        )
    assert losses[2] < losses[1] < losses[0]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, -1.0, float("inf"), float("nan"), TEXT, True])
def test_bad_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match=r"lora_one: gamma=.*must be a finite number > 0"):
        LoraConfig(init_lora_weights={"name": "lora_one", "gamma": gamma})
