"""lora_null, against W N Nᵀ with N by a full eigendecomposition in float64."""

import pytest
import torch
from layers import layer_of, product
from measures import relative_gap
from models import llama, spread_weight, token_batches

from lora_init import LoraConfig, get_peft_model
from lora_init.initializers.lora_null import LoraNullOptions, lora_null
from lora_init.linalg.moments import InputStatistics

SHAPES = [(48, 48), (80, 32), (32, 80)]
RANK = 6


def inputs(columns, tokens=2000):
    """No two directions are used alike, and their mean is not zero."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    scales = torch.logspace(0, -2, columns)
    return (torch.randn(tokens, columns, generator=generator) * scales) @ basis + 0.1


def factors_of(weight, x, scaling=2.0, rank=RANK):
    layer = layer_of(weight, rank, scaling, inputs=InputStatistics.of_rows(x))
    return lora_null(layer, LoraNullOptions())


@pytest.mark.parametrize("scaling", [1 / 16, 2.0, 16.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_the_definition(rows, columns, scaling):
    weight, x = spread_weight(rows, columns), inputs(columns)
    moment = x.double().T @ x.double() / len(x)
    values, vectors = torch.linalg.eigh(moment)
    unused = vectors[:, :RANK]
    expected = weight.double() @ unused @ unused.T
    factors = factors_of(weight, x, scaling)
    assert relative_gap(product(factors, scaling), expected) < 1e-3
    singular = torch.linalg.svdvals(expected)
    for grams in (factors.lora_A @ factors.lora_A.T, factors.lora_B.T @ factors.lora_B):
        torch.testing.assert_close(
            grams.double(), torch.diag(singular[:RANK] / scaling), rtol=1e-3, atol=1e-5
        )
    share = values[:RANK].sum() / values.sum()
    assert float(factors.metrics["inputs_used"]) == pytest.approx(float(share), rel=1e-2)


def test_the_data_hardly_pass_through_it():
    """And less of them than through any other part of rank r of the same weight that is taken."""
    weight, x = spread_weight(64, 64), inputs(64)

    def passing(part):
        return float((x.double() @ part.T).norm() / (x.double() @ weight.double().T).norm())

    last = torch.linalg.svd(weight.double(), full_matrices=False)
    milora = (last[0][:, -RANK:] * last[1][-RANK:]) @ last[2][-RANK:]
    ours = product(factors_of(weight, x))
    assert passing(ours) < 0.05
    # Beside its own norm: MiLoRA's part is small because its singular values are.
    assert passing(ours) / ours.norm() < passing(milora) / milora.norm() / 5


def test_fewer_tokens_than_inputs():
    """More directions are unused than the adapter takes: nothing at all passes through."""
    weight, x = spread_weight(40, 64), inputs(64, tokens=10)
    factors = factors_of(weight, x)
    part = product(factors)
    assert relative_gap(part @ torch.linalg.pinv(part) @ part, part) < 1e-6
    assert part.norm() > 0.05 * weight.norm()
    assert (x.double() @ part.T).norm() < 1e-5 * (x.double() @ weight.double().T).norm()
    assert float(factors.metrics["inputs_used"]) < 1e-10


@pytest.mark.parametrize("method", ["lora_null", "lora_null_frozen"])
def test_on_a_model(method):
    """Both start from the same factors; one of them trains both."""
    batches = token_batches()
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=method)
    model = get_peft_model(llama(), config, calibration=batches, cache=False)
    trained = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == ({"lora_B"} if method == "lora_null_frozen" else {"lora_A", "lora_B"})
    assert {layer.base_state for layer in model.layers.values()} == {"edited"}
    rows = model.init_report().layers
    assert all(0 <= row.details["inputs_used"] < 0.5 for row in rows)
    other = get_peft_model(
        llama(),
        LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights="lora_null"),
        calibration=batches, cache=False,
    )  # fmt: skip
    for name, layer in model.layers.items():
        assert torch.equal(layer.lora_A, other.layers[name].lora_A)
        assert torch.equal(layer.lora_B, other.layers[name].lora_B)
