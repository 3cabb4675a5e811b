"""osrm: the last eigenvectors of the other tasks' inputs, by a full decomposition in float64."""

import pytest
import torch
from layers import layer_of
from measures import relative_gap

from lora_init.initializers.osrm import OsrmOptions, osrm
from lora_init.linalg.moments import InputStatistics

RANK = 6


def inputs(columns, tokens=2000):
    """No two directions are used alike, and their mean is not zero."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    drawn = torch.randn(tokens, columns, generator=generator) * torch.logspace(0, -2, columns)
    return drawn @ basis + 0.1


def factors_of(rows, x, scaling=2.0, rank=RANK):
    weight = torch.empty(rows, x.shape[1], device="meta")
    return osrm(layer_of(weight, rank, scaling, inputs=InputStatistics.of_rows(x)), OsrmOptions())


@pytest.mark.parametrize("scaling", [1.0, 2.0, 5.66, 16.0])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(48, 48, RANK), (80, 32, 32), (32, 80, RANK)]
)
def test_is_the_end_of_the_full_decomposition(rows, columns, rank, scaling):
    x = inputs(columns)
    moment = x.double().T @ x.double() / len(x)
    values, vectors = torch.linalg.eigh(moment)
    factors = factors_of(rows, x, scaling, rank)
    lora_A, unused = factors.lora_A.double(), vectors[:, :rank]
    torch.testing.assert_close(lora_A @ lora_A.T, torch.eye(rank).double(), rtol=0, atol=1e-6)
    assert relative_gap(lora_A.T @ lora_A, unused @ unused.T) < 1e-3
    passing = float((lora_A @ moment @ lora_A.T).diagonal().sum())
    assert passing == pytest.approx(float(values[:rank].sum()), rel=1e-3)
    assert float(factors.metrics["inputs_used"]) == pytest.approx(
        float(values[:rank].sum() / values.sum()), rel=1e-2
    )
    assert factors.lora_B.shape == (rows, rank)
    assert not factors.lora_B.any()


def test_fewer_tokens_than_inputs():
    """A lies in the null space of the inputs."""
    x = inputs(64, tokens=10)
    lora_A = factors_of(40, x).lora_A.double()
    assert (x.double() @ lora_A.T).norm() < 1e-5 * x.double().norm()
