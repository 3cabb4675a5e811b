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

from lora_init import LoraConfig, WithLoss, get_peft_model, init_factors
from lora_init.initializers.lora_ga import LoraGaOptions, lora_ga

RANK = 4
GAMMA = 16.0
SHAPES = [(40, 40), (56, 24), (24, 56)]


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
    """As of a pooler, which reads one row a sequence. The rest are orthogonal directions."""
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


# -- options ---------------------------------------------------------------------------------------

DIRECTIONS = {  # the triplets of A and of B
    "ArB2r": (range(RANK), range(RANK, 2 * RANK)),
    "A2rBr": (range(RANK, 2 * RANK), range(RANK)),
    "ArBr": (range(1, 2 * RANK, 2), range(0, 2 * RANK, 2)),
}


def triplet_indices(gradient, factors):
    """The number of the singular vector that each row of A and each column of B is."""
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    rows = (right @ factors.lora_A.double().T).abs()
    columns = (left.T @ factors.lora_B.double()).abs()
    return rows.argmax(0).tolist(), columns.argmax(0).tolist()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_direction_divides_the_triplets(rows, columns, direction):
    gradient = steep(rows, columns)
    found = triplet_indices(gradient, factors_of(gradient, direction=direction))
    assert found == tuple(map(list, DIRECTIONS[direction]))


def test_random_halves_are_disjoint_and_seeded():
    gradient = steep(40, 40)
    drawn = set()
    for seed in range(8):
        layer = layer_of(gradient, RANK, gradient=gradient, seed=seed)
        of_A, of_B = triplet_indices(gradient, lora_ga(layer, LoraGaOptions(direction="random")))
        assert sorted(of_A + of_B) == list(range(2 * RANK))
        drawn.add(tuple(of_A))
    assert len(drawn) > 4
    gradients = torch.stack([gradient, gradient])
    stack = layer_of(gradients, RANK, name=("layer", "other"), gradient=gradients)
    stack = lora_ga(stack, LoraGaOptions(direction="random"))
    assert relative_gap(stack.lora_A[0], factors_of(gradient, direction="random").lora_A) < 1e-6


@pytest.mark.parametrize("direction", [*DIRECTIONS, "random"])
def test_every_direction_captures_2r_singular_values(direction):
    """‖P(G)‖² with P the projection on the tangent space: Σ σ² of the first 2r triplets."""
    gradient = steep(56, 24).double()
    factors = factors_of(gradient.float(), direction=direction)
    right = torch.linalg.qr(factors.lora_A.double().T)[0]
    left = torch.linalg.qr(factors.lora_B.double())[0]
    outside = gradient - left @ (left.T @ gradient)
    outside = outside - outside @ right @ right.T
    captured = gradient.square().sum() - outside.square().sum()
    values = torch.linalg.svdvals(gradient)[: 2 * RANK]
    assert float(captured) == pytest.approx(float(values.square().sum()), rel=1e-5)


@pytest.mark.parametrize("scaling", [1.0, 2.0, 5.66, 16.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_each_scale_is_the_official_one(rows, columns, scaling):
    gradient, weight = steep(rows, columns), spread_weight(rows, columns)
    roots = (torch.linalg.svdvals(weight.double())[:RANK] / scaling).sqrt()
    norms = {
        "stable": rows**0.25 / GAMMA**0.5,
        "unit": 1.0,
        "gd": 1 / scaling,
        "weight_svd": float(roots.mean()),
    }
    for scale, norm in norms.items():
        layer = layer_of(weight, RANK, scaling, gradient=gradient)
        factors = lora_ga(layer, LoraGaOptions(scale=scale))
        for lengths in (factors.lora_A.norm(dim=1), factors.lora_B.norm(dim=0)):
            torch.testing.assert_close(lengths, torch.full((RANK,), norm), rtol=1e-5, atol=0)


def test_loi_is_a_direction_and_a_scale():
    """RiemannLoRA's start, up to its factor alpha: U_{1:r} V_{r+1:2r}ᵀ of the gradient."""
    gradient = steep(24, 56)
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    factors = factors_of(gradient, direction="A2rBr", scale="unit")
    expected = left[:, :RANK] @ right[RANK : 2 * RANK]
    product = factors.lora_B.double() @ factors.lora_A.double()
    # The sign of each triplet is free: compare what does not depend on it.
    signs = torch.sign((left[:, :RANK].T @ product @ right[RANK : 2 * RANK].T).diagonal())
    assert relative_gap(product, (left[:, :RANK] * signs) @ right[RANK : 2 * RANK]) < 1e-5
    assert float(product.norm()) == pytest.approx(float(expected.norm()), rel=1e-5)


def test_the_weights_singular_values_on_a_model():
    """Only scale="weight_svd" reads the weight, in a model and for one matrix."""
    base = Chain()
    settings = {"name": "lora_ga", "scale": "weight_svd"}
    config = LoraConfig(r=RANK, target_modules=["tall"], init_lora_weights=settings)
    data = WithLoss([chain_inputs(30)], mean_square)
    model = get_peft_model(copy.deepcopy(base), config, calibration=data)
    values = torch.linalg.svdvals(base.tall.weight.detach().double())[:RANK]
    norm = float((values / 2).sqrt().mean())
    torch.testing.assert_close(
        model.layers["tall"].lora_A.norm(dim=1), torch.full((RANK,), norm), rtol=1e-4, atol=0
    )
    gradient = mean_gradients(base, [chain_inputs(30)])["tall"]
    alone = init_factors(
        base.tall.weight, settings, r=RANK, lora_alpha=8, gradient=gradient.float(), name="tall"
    )
    torch.testing.assert_close(
        alone.lora_A.norm(dim=1), torch.full((RANK,), norm), rtol=1e-4, atol=0
    )


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
@pytest.mark.wrong_types
def test_bad_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match=r"lora_ga: gamma=.*must be a finite number > 0"):
        LoraConfig(init_lora_weights={"name": "lora_ga", "gamma": gamma})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "ArB3r"}, r"direction='ArB3r' .* ArB2r, A2rBr, ArBr, random"),
        ({"scale": "gd_scale"}, r"scale='gd_scale' .* stable, unit, gd, weight_svd"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"lora_ga: {message}"):
        LoraConfig(init_lora_weights={"name": "lora_ga", **options})


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
