"""osrm: the last eigenvectors of the other tasks' inputs, by a full decomposition in float64."""

import pytest
import torch
from layers import layer_of
from measures import relative_gap
from models import llama, token_batches

from lora_init import LoraConfig, get_peft_model
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


@pytest.mark.parametrize("method", ["osrm", "osrm_frozen"])
def test_on_a_model(method):
    """A trained adapter with a frozen A leaves the outputs for other tasks alone."""
    batches = token_batches()
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=method)
    model = get_peft_model(llama(), config, calibration=batches, cache=False)
    trained = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == ({"lora_B"} if method == "osrm_frozen" else {"lora_A", "lora_B"})
    starts = {name: layer.lora_A.clone() for name, layer in model.layers.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batches[0]).logits.square().mean().backward()
        optimizer.step()
    for name, layer in model.layers.items():
        assert layer.lora_B.any()
        assert torch.equal(layer.lora_A, starts[name]) == (method == "osrm_frozen")
