"""lora_sb: the truncated SVD of -step sign(G) in float64; and the gradient of its core."""

import pytest
import torch
from measures import relative_gap
from networks import Chain, chain_inputs

from lora_init import LoraConfig, WithLoss, calibrate, get_peft_model, init_factors

SHAPES = [(48, 48), (80, 32), (32, 80)]
RANK = 6


def gradient_of(rows, columns):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)


def best_part(gradient, step, rank=RANK):
    left, values, right = torch.linalg.svd(-step * gradient.double().sign(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize(
    ("alpha", "use_rslora"), [(6, False), (12, False), (33.96, False), (96, False), (6, True)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_papers_formula(shape, alpha, use_rslora):
    gradient, step = gradient_of(*shape), 2e-3
    factors = init_factors(
        torch.zeros(shape), "lora_sb", r=RANK, lora_alpha=alpha, use_rslora=use_rslora,
        options={"step": step}, gradient=gradient,
    )  # fmt: skip
    s = alpha / (RANK**0.5 if use_rslora else RANK)
    product = s * factors.output_factor.double() @ factors.lora_A.double()
    best = best_part(gradient, step)
    # The spectrum of signs is flat: the objective is judged, not the subspace.
    target = -step * gradient.double().sign()
    assert (target - product).norm() <= (1 + 1e-4) * (target - best).norm()
    for gram in (factors.lora_B.T @ factors.lora_B, factors.lora_A @ factors.lora_A.T):
        assert relative_gap(gram, torch.eye(RANK)) < 1e-5
    share = best.square().sum() / target.square().sum()
    assert float(factors.metrics["step_energy"]) == pytest.approx(float(share), rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_the_whole_step(shape):
    gradient = gradient_of(*shape)
    gradient[0] = 0  # an entry without a gradient does not move
    factors = init_factors(torch.zeros(shape), "lora_sb", r=min(shape), gradient=gradient)
    product = factors.output_factor.double() @ factors.lora_A.double()
    assert relative_gap(product, -3.2e-6 * gradient.double().sign()) < 1e-4


def test_the_gradient_of_the_core_is_the_projected_gradient():
    """dL/dR = s Bᵀ G Aᵀ, and a step on R moves W by s² B Bᵀ G Aᵀ A."""
    base, x = Chain(), chain_inputs(40)
    batches = WithLoss([x], lambda model, batch: model(batch).square().mean())
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["square"], init_lora_weights="lora_sb")
    found = calibrate(base, config, batches)
    gradient = found.layers["square"].gradient.double()
    model = get_peft_model(base, config, calibration=found)
    layer = model.layers["square"]
    with torch.no_grad():
        layer.lora_core.zero_()  # the gradient at the base model
    model(x).square().mean().backward()
    s, A, B = layer.scaling, layer.lora_A.double(), layer.lora_B.double()
    assert relative_gap(layer.lora_core.grad, s * B.T @ gradient @ A.T) < 1e-4
    before = layer.delta_weight().double()
    with torch.no_grad():
        layer.lora_core -= layer.lora_core.grad
    moved = layer.delta_weight().double() - before
    assert relative_gap(moved, -(s**2) * B @ B.T @ gradient @ A.T @ A) < 1e-4


@pytest.mark.parametrize("step", [0, -1, float("inf")])
def test_bad_step(step):
    with pytest.raises(ValueError, match="lora_sb: step=.*finite number > 0"):
        LoraConfig(init_lora_weights={"name": "lora_sb", "step": step})
