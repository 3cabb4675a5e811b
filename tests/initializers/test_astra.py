"""astra: the projection of W on the eigenvectors of its outputs' moment, dense in float64."""

import pytest
import torch
from layers import layer_of, product
from measures import relative_gap
from models import spread_weight

from lora_init.factors import Replacement
from lora_init.initializers.astra import astra
from lora_init.initializers.corda import CordaOptions, corda
from lora_init.initializers.qera import QeraOptions, qera
from lora_init.linalg.moments import InputStatistics
from lora_init.registry import Options

RANK = 6
SHAPES = [(48, 48), (80, 32), (32, 80)]
SCALINGS = [1.0, 2.0, 5.66, 16.0]


def inputs(columns, tokens=400):
    """Correlated, with a mean and deviations over a decade."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    drawn = torch.randn(tokens, columns, generator=generator) + 0.3
    return (drawn * torch.logspace(0, -1.25, columns)) @ basis


def factors_of(weight, x, scaling=2.0, rank=RANK):
    return astra(layer_of(weight, rank, scaling, inputs=InputStatistics.of_rows(x)), Options())


def lost(weight, x, part):
    """Mean of ‖(W - part) x‖² over the very inputs."""
    return float((x.double() @ (weight.double() - part).T).square().sum() / len(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_the_dense_projection(rows, columns, scaling, dtype):
    weight, x = spread_weight(rows, columns).to(dtype), inputs(columns)
    outputs = x.double() @ weight.double().T
    vectors = torch.linalg.eigh(outputs.T @ outputs)[1][:, -RANK:]
    factors = factors_of(weight, x, scaling)
    expected = vectors @ vectors.T @ weight.double()
    assert relative_gap(product(factors, scaling), expected) < 1e-4
    square = factors.lora_B.double().T @ factors.lora_B.double()
    torch.testing.assert_close(square, torch.eye(RANK).double(), rtol=0, atol=1e-5)
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32


@pytest.mark.parametrize(("rows", "columns", "rank"), [(48, 48, RANK), (320, 300, 8), (24, 60, 24)])
def test_has_the_least_output_error_of_this_rank(rows, columns, rank):
    """E‖(W - s B A) x‖² is the sum of σ² of W R^½ beyond the first r."""
    weight, x = spread_weight(rows, columns), inputs(columns, tokens=900)
    values, vectors = torch.linalg.eigh(x.double().T @ x.double() / len(x))
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    squares = torch.linalg.svdvals(weight.double() @ root).square()
    factors = factors_of(weight, x, rank=rank)
    left = lost(weight, x, product(factors))
    assert left == pytest.approx(float(squares[rank:].sum()), rel=2e-4, abs=1e-6)
    share = float(factors.metrics["output_energy"])
    assert share == pytest.approx(float(squares[:rank].sum() / squares.sum()), rel=1e-4)


def test_fewer_tokens_than_the_rank():
    """The outputs are reproduced exactly, and the remaining rank is not lost."""
    weight, x = spread_weight(40, 64), inputs(64, tokens=4)
    part = product(factors_of(weight, x))
    assert lost(weight, x, part) < 1e-8 * lost(weight, x, torch.zeros(()))
    assert torch.linalg.svdvals(part)[RANK - 1] > 0.05 * torch.linalg.svdvals(weight.double())[0]


def test_is_qera_of_a_base_that_is_zero(monkeypatch):
    """The same projection, when quantization loses everything."""
    weight, x = spread_weight(48, 40), inputs(40)
    monkeypatch.setattr(
        "lora_init.quantization.Quantizer.roundtrip", lambda self, given: torch.zeros_like(given)
    )
    layer = layer_of(weight, RANK, inputs=InputStatistics.of_rows(x))
    other = qera(layer, QeraOptions())
    assert isinstance(other.replacement, Replacement)
    assert relative_gap(product(factors_of(weight, x)), product(other)) < 1e-6


def test_differs_from_corda_by_one_factor_of_the_moment():
    """corda's product comes from W R² Wᵀ: near, and with a larger output error."""
    weight, x = spread_weight(48, 40), inputs(40)
    layer = layer_of(weight, RANK, inputs=InputStatistics.of_rows(x))
    other = product(corda(layer, CordaOptions()))
    assert lost(weight, x, product(factors_of(weight, x))) < lost(weight, x, other)
