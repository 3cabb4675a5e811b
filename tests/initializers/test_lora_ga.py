"""lora_ga: singular vectors of the loss's gradient, and the first step that they are chosen for."""

import copy

import pytest
import torch
from layers import layer_of
from losses import mean_gradients, mean_square
from measures import relative_gap
from models import spread_weight
from networks import Chain, chain_inputs, linear
from torch import nn

from lora_init import LoraConfig, WithLoss, get_peft_model
from lora_init.initializers.lora_ga import LoraGaOptions, lora_ga
from lora_init.weights.kinds import oriented_weight

RANK = 4
GAMMA = 16.0
SHAPES = [(40, 40), (56, 24), (24, 56)]
every_scaling = pytest.mark.parametrize(
    ("alpha", "use_rslora"), [(RANK / 16, False), (2 * RANK, False), (16 * RANK, False), (16, True)]
)


def factors_of(gradient, rank=RANK, scaling=2.0, **options):
    return lora_ga(layer_of(gradient, rank, scaling, gradient=gradient), LoraGaOptions(**options))


def reference(gradient, rank=RANK, gamma=GAMMA):
    """By a full SVD in float64; each left vector's largest entry is positive."""
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    signs = torch.sign(left.gather(0, left.abs().argmax(0, keepdim=True)))
    left, right = left * signs, right * signs.T
    size = gradient.shape[0] ** 0.25 / gamma**0.5
    return size * right[:rank], size * left[:, rank : 2 * rank]


def steep(rows, columns, decay=0.8):
    """A gradient: small, and of singular values that fall by a factor each."""
    size = min(rows, columns)
    generator = torch.Generator().manual_seed(rows)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64))[0]
    values = 1e-4 * decay ** torch.arange(size, dtype=torch.float64)
    return ((left * values) @ right.T).float()


# -- factors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [16.0, 1, 300.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_factors_are_those_of_the_full_svd(rows, columns, gamma):
    gradient = steep(rows, columns)
    factors = factors_of(gradient, gamma=gamma)
    lora_A, lora_B = reference(gradient, gamma=gamma)
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32
    assert relative_gap(factors.lora_A, lora_A) < 1e-5
    assert relative_gap(factors.lora_B, lora_B) < 1e-5


@pytest.mark.parametrize(
    ("rows", "columns", "decay"), [(400, 320, 0.97), (320, 700, 0.6), (1100, 1040, 0.9)]
)
def test_each_vector_is_resolved_where_a_krylov_space_answers(rows, columns, decay):
    """B begins in the middle of what is computed, so that a good subspace is not enough."""
    gradient = steep(rows, columns, decay)
    factors = factors_of(gradient, rank=8)
    lora_A, lora_B = reference(gradient, rank=8)
    assert relative_gap(factors.lora_A, lora_A) < 1e-3
    assert relative_gap(factors.lora_B, lora_B) < 1e-3


def test_a_gradient_of_lower_rank_gives_orthonormal_factors():
    """A pooler's, say, which sees a row a sequence: the rest are directions beside it."""
    gradient = steep(24, 56, decay=0.5)[:, :3] @ steep(56, 24, decay=0.5)[:3]
    for zero in (gradient, torch.zeros(24, 24)):
        factors = factors_of(zero)
        square = 24**0.5 / GAMMA * torch.eye(RANK)
        torch.testing.assert_close(factors.lora_A @ factors.lora_A.T, square, rtol=0, atol=1e-5)
        torch.testing.assert_close(factors.lora_B.T @ factors.lora_B, square, rtol=0, atol=1e-5)


def test_a_stack_of_gradients_gives_a_stack_of_factors():
    gradients = torch.stack([steep(24, 56), steep(24, 56, decay=0.7)])
    layers = layer_of(gradients, RANK, name=("first", "second"), gradient=gradients)
    stack = lora_ga(layers, LoraGaOptions())
    for gradient, lora_A, lora_B in zip(gradients, stack.lora_A, stack.lora_B, strict=True):
        alone = factors_of(gradient)
        assert relative_gap(lora_A, alone.lora_A) < 1e-6
        assert relative_gap(lora_B, alone.lora_B) < 1e-6


# -- the first step --------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [1 / 16, 1.0, 16.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_first_step_is_the_best_of_rank_2r(rows, columns, scaling):
    """s (ΔB A + B ΔA) of an SGD step of rate 1, by autograd: -(s k)² times G cut at 2r triplets."""
    gradient = steep(rows, columns).double()
    factors = factors_of(gradient.float(), scaling=scaling)
    lora_A, lora_B = (
        factor.double().requires_grad_() for factor in (factors.lora_A, factors.lora_B)
    )
    ((scaling * lora_B @ lora_A) * gradient).sum().backward()  # a loss with this gradient
    step = -scaling * (lora_B.grad @ lora_A + lora_B @ lora_A.grad)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    best = (left[:, : 2 * RANK] * values[: 2 * RANK]) @ right[: 2 * RANK]
    assert relative_gap(step, -(scaling**2) * rows**0.5 / GAMMA * best) < 1e-5


# -- from data to model ----------------------------------------------------------------------------


@every_scaling
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_end_to_end(kind, alpha, use_rslora):
    """The gradient is the layer's own, in the right orientation; s B A leaves the base."""
    base = Chain(kind)
    batches = [chain_inputs(rows, seed=rows) for rows in (30, 10)]
    config = LoraConfig(
        r=RANK, lora_alpha=alpha, use_rslora=use_rslora, target_modules=["square", "tall", "wide"],
        init_lora_weights="lora_ga",
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), config, calibration=WithLoss(batches, mean_square))
    gradients = mean_gradients(base, batches)
    scaling = alpha / (RANK**0.5 if use_rslora else RANK)
    for name, layer in model.layers.items():
        lora_A, lora_B = reference(gradients[name])
        assert relative_gap(layer.lora_A, lora_A) < 2e-3, name
        assert relative_gap(layer.lora_B, lora_B) < 2e-3, name
        product = scaling * layer.lora_B.double() @ layer.lora_A.double()
        residual = oriented_weight(base.get_submodule(name)).double() - product
        assert relative_gap(oriented_weight(layer.base_layer), residual) < 1e-6, name


def test_plan_and_report_say_what_is_read():
    model = nn.Sequential(linear("Linear", spread_weight(24, 32)))
    config = LoraConfig(r=RANK, target_modules=["0"], init_lora_weights="lora_ga")
    plan = get_peft_model(model, config, dry_run=True)
    assert "needs calibration data with labels" in str(plan)
    assert plan.statistics_bytes == 4 * 24 * 32
    data = WithLoss([torch.randn(9, 32)], mean_square)
    report = get_peft_model(model, config, calibration=data).init_report()
    assert report.needs_calibration
    assert report.seconds["calibration"] > 0
    assert report.layers[0].details["residual"] < 1e-5


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, -1.0, float("inf"), float("nan"), "16", True])
def test_bad_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match=r"lora_ga: gamma=.*must be a finite number > 0"):
        LoraConfig(init_lora_weights={"name": "lora_ga", "gamma": gamma})


def test_a_rank_above_half_the_smaller_side_is_refused():
    config = LoraConfig(r=13, target_modules=["tall", "wide"], init_lora_weights="lora_ga")
    with pytest.raises(ValueError, match=r"'wide': lora_ga cannot .* 13.*must be at most 12"):
        get_peft_model(Chain(), config, calibration=[])


def test_data_without_labels_are_refused():
    config = LoraConfig(r=RANK, target_modules=["tall"], init_lora_weights="lora_ga")
    with pytest.raises(ValueError, match="needs calibration data: .*, each with labels"):
        get_peft_model(Chain(), config)
    with pytest.raises(ValueError, match="returned a Tensor without one; pass batches with labels"):
        get_peft_model(Chain(), config, calibration=[chain_inputs(4)])
