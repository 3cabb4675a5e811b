"""srr: each component by dense algebra in float64, and the errors of both forms."""

import pytest
import torch
from layers import layer_of, product
from measures import relative_gap
from models import spread_weight

from lora_init import LoraConfig, get_peft_model
from lora_init.initializers.qera import QeraOptions, qera
from lora_init.initializers.srr import SrrOptions, srr
from lora_init.linalg.moments import InputStatistics
from lora_init.quantization import Quantizer

RANK = 6
SHAPES = [(64, 64), (96, 40), (40, 96)]


def inputs(columns, tokens=400):
    """Correlated, with a mean and deviations over a decade."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    drawn = torch.randn(tokens, columns, generator=generator) + 0.3
    return (drawn * torch.logspace(0, -1.25, columns)) @ basis


def layer(weight, x, scaling=2.0, rank=RANK, **settings):
    return layer_of(weight, rank, scaling, inputs=InputStatistics.of_rows(x), **settings)


def moment_of(x):
    moment = x.double().T @ x.double() / len(x)
    return moment + 1e-6 * moment.diagonal().mean() * torch.eye(len(moment))


def top(matrix, moment, count):
    """The leading eigenvectors of M R Mᵀ."""
    matrix = matrix.double()
    return torch.linalg.eigh(matrix @ moment @ matrix.T)[1].flip(1)[:, :count]


def output_error(weight, factors, x, scaling=2.0):
    """Mean of ‖(W - Q - s B A) x‖² over the very inputs."""
    base = factors.replacement.base(weight, scaling).double()
    lost = weight.double() - base - product(factors, scaling)
    return float((x.double() @ lost.T).square().sum() / len(x))


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("kept", [0, 2, RANK])
@pytest.mark.parametrize("scaling", [1.0, 2.0, 5.66, 16.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_the_dense_formula(rows, columns, scaling, kept, refit):
    weight, x = spread_weight(rows, columns), inputs(columns)
    moment = moment_of(x)
    factors = srr(layer(weight, x, scaling), SrrOptions(preserved=kept, refit=refit, bits=2))
    basis = top(weight, moment, kept)
    held = basis @ basis.T @ weight.double()
    base = factors.replacement.base(weight, scaling).double()
    quantized = Quantizer("nf2", 2).roundtrip((weight.double() - held).float()).double()
    # A code next to a threshold may differ: its preserved part is rounded in another order.
    assert float((base - quantized).abs().gt(1e-5).double().mean()) < 0.002
    error = weight.double() - base if refit else weight.double() - held - base
    rest = top(error, moment, RANK if refit else RANK - kept)
    expected = rest @ rest.T @ error + (0 if refit else held)
    assert relative_gap(product(factors, scaling), expected) < 1e-3
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32
    found = output_error(weight, factors, x, scaling)
    whole = float((x.double() @ weight.double().T).square().sum() / len(x))
    assert factors.metrics["output_error"] == pytest.approx((found / whole) ** 0.5, rel=1e-3)


def test_nothing_preserved_is_qera():
    weight, x = spread_weight(64, 40), inputs(40)
    ours = srr(layer(weight, x), SrrOptions(preserved=0))
    theirs = qera(layer(weight, x), QeraOptions())
    assert relative_gap(product(ours), product(theirs)) < 1e-5
    assert torch.equal(ours.replacement.base(weight, 2.0), theirs.replacement.base(weight, 2.0))


@pytest.mark.parametrize("kept", range(RANK + 1))
def test_a_refit_never_loses(kept):
    weight, x = spread_weight(48, 48), inputs(48)
    plain, refitted = (
        srr(layer(weight, x), SrrOptions(preserved=kept, refit=refit, bits=2))
        for refit in (False, True)
    )
    assert output_error(weight, refitted, x) <= output_error(weight, plain, x) * (1 + 1e-4)
    before = refitted.metrics["output_error_before_refit"]
    assert before == pytest.approx(plain.metrics["output_error"], rel=1e-4)


@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_the_number_of_preserved_components_minimizes_the_rule(decay):
    """By dense singular values, with the random matrix of the layer's own stream."""
    weight = spread_weight(48, 40) * torch.logspace(0, -decay, 40)
    x = inputs(40)
    values, vectors = torch.linalg.eigh(moment_of(x))
    root = (vectors * values.sqrt()) @ vectors.T
    chosen = layer(weight, x)
    found = srr(chosen, SrrOptions()).metrics["preserved_components"]
    noise = 2 * torch.rand(48, 40, generator=layer(weight, x).generator).double() - 1

    def beyond(matrix):
        squares = torch.linalg.svdvals(matrix @ root).square()
        return [float(squares[count:].sum() / squares.sum()) for count in range(RANK + 1)]

    first, second = beyond(weight.double()), beyond(noise)
    rule = [first[count] * second[RANK - count] for count in range(RANK + 1)]
    assert found == min(range(RANK + 1), key=rule.__getitem__)


def test_fewer_tokens_than_inputs_and_full_rank():
    weight, x = spread_weight(24, 64), inputs(64, tokens=10)
    whole = float((x.double() @ weight.double().T).square().sum() / len(x))
    errors = {}
    for rank in (RANK, 10, 24):
        factors = srr(layer(weight, x, rank=rank), SrrOptions())
        assert factors.lora_A.isfinite().all()
        errors[rank] = output_error(weight, factors, x) / whole
    assert errors[24] < 1e-4
    assert errors[10] < errors[RANK] < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preserved": -1}, r"srr: preserved=-1 .* None or an integer >= 0"),
        ({"preserved": True}, r"srr: preserved=True .* None or an integer >= 0"),
        pytest.param({"refit": 1}, r"srr: refit=1 .* True or False", marks=pytest.mark.wrong_types),
        ({"bits": 3}, r"srr: bits=3 .* 2, 4 or 8"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(init_lora_weights={"name": "srr", **options})


def test_more_preserved_components_than_ranks_are_refused():
    settings = {"name": "srr", "preserved": 5}
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=settings)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"srr cannot have rank 4: preserved=5"):
        get_peft_model(model, config, calibration=[torch.randn(8, 16)])
