"""loftq, by full float64 SVDs and the same quantiser."""

import copy

import pytest
import torch
from layers import layer_of
from measures import relative_gap
from models import spread_weight
from networks import Chain, chain_inputs

from lora_init import LoraConfig, get_peft_model
from lora_init.initializers.loftq import LoftqOptions, loftq
from lora_init.quantization import Quantizer

RANK = 8
SCALINGS = [1 / 16, 2.0, 16.0]


def factors_of(weight, scaling=2.0, rank=RANK, **options):
    return loftq(layer_of(weight, rank, scaling), LoftqOptions(**options))


def reference(weight, scaling, iterations, quantizer, rank=RANK):
    """Algorithm 1 with the scaling divided out; returns Q and s B A."""
    weight = weight.double()
    product = torch.zeros_like(weight)
    for _ in range(iterations):
        base = quantizer.roundtrip((weight - product).float()).double()
        u, s, vt = torch.linalg.svd(weight - base, full_matrices=False)
        root = (s[:rank] / scaling).sqrt()
        product = scaling * (u[:, :rank] * root) @ (root[:, None] * vt[:rank])
    return base, product


def error(weight, base, product):
    return float((weight.double() - base - product).norm() / weight.norm())


def result(weight, factors, scaling):
    base = factors.replacement.base(weight, scaling).double()
    return base, scaling * factors.lora_B.double() @ factors.lora_A.double()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (96, 40), (40, 96)])
def test_one_iteration_is_the_reference(rows, columns, scaling):
    weight = spread_weight(rows, columns)
    base, product = result(weight, factors_of(weight, scaling, loftq_iter=1), scaling)
    expected_base, expected_product = reference(weight, scaling, 1, Quantizer())
    assert torch.equal(base, expected_base)
    assert relative_gap(product, expected_product) < 1e-3
    assert error(weight, base, product) == pytest.approx(
        error(weight, expected_base, expected_product), rel=1e-5
    )


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    ("options", "quantizer"),
    [
        ({}, Quantizer()),
        ({"loftq_bits": 2}, Quantizer("nf2", 2)),
        ({"loftq_bits": 4, "quantizer": "uniform"}, Quantizer("uniform", 4)),
    ],
)
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (40, 96)])
def test_five_iterations_are_as_good_as_the_reference(rows, columns, options, quantizer, scaling):
    """A code that flips on its last bit sends the iterations apart: compare the objective."""
    weight = spread_weight(rows, columns)
    factors = factors_of(weight, scaling, **options)
    actual = error(weight, *result(weight, factors, scaling))
    expected = error(weight, *reference(weight, scaling, 5, quantizer))
    assert actual == pytest.approx(expected, rel=2e-3)
    assert factors.metrics["error"] == pytest.approx(actual, rel=1e-4)
    assert len(factors.metrics["error_by_iteration"]) == 5
    # The last step is the best rank-r approximation of what its own base lacks.
    base, _ = result(weight, factors, scaling)
    optimum = torch.linalg.svdvals(weight.double() - base)[RANK:].norm() / weight.norm()
    assert actual == pytest.approx(float(optimum), rel=1e-3)


@pytest.mark.parametrize("iterations", [1, 5])
def test_error_does_not_depend_on_the_scaling(iterations):
    weight = spread_weight(96, 64)
    errors = [
        error(weight, *result(weight, factors_of(weight, s, loftq_iter=iterations), s))
        for s in SCALINGS
    ]
    plain = error(weight, Quantizer().roundtrip(weight).double(), torch.zeros(96, 64))
    assert max(errors) == pytest.approx(min(errors), rel=1e-5 if iterations == 1 else 2e-3)
    assert max(errors) < 0.95 * plain


def test_error_falls_with_rank_bits_and_iterations():
    weight = spread_weight(96, 64)

    def figure(**options):
        return factors_of(weight, **options).metrics["error"]

    assert figure(rank=32) < figure(rank=8) < figure(rank=1)
    assert figure(loftq_bits=8) < figure(loftq_bits=4) < figure(loftq_bits=2)
    assert figure(loftq_iter=5) < figure(loftq_iter=1)
    metrics = factors_of(weight, loftq_iter=1).metrics
    plain = error(weight, Quantizer().roundtrip(weight).double(), torch.zeros(96, 64))
    assert metrics["error_without_adapter"] == pytest.approx(plain, rel=1e-5)
    assert metrics["error_by_iteration"] == [metrics["error"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_keep_original(kind, dtype):
    base = Chain(kind, dtype)
    with torch.no_grad():  # digits that only this dtype can hold
        base.square.weight += 1e-9 * torch.randn(32, 32, dtype=torch.float64).to(dtype)
    config = LoraConfig(
        r=4, target_modules=["square", "wide"],
        init_lora_weights="loftq",
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), config, keep_original=True)
    x = chain_inputs(20, dtype=dtype)
    assert relative_gap(model(x), base(x)) > 1e-3
    with model.disable_adapter():
        assert relative_gap(model(x), base(x)) < {
            torch.float32: 2e-6, torch.bfloat16: 2 ** -7, torch.float64: 1e-12
        }[dtype]  # fmt: skip
    restored = model.unload()
    for key, value in base.state_dict().items():
        assert torch.equal(restored.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loftq_bits": 3}, "loftq_bits=3 is not supported: must be 2, 4 or 8"),
        ({"loftq_iter": 0}, "loftq_iter=0 is not supported: must be an integer >= 1"),
        ({"quantizer": "fp4"}, "quantizer='fp4'.*normal_float.*uniform"),
        ({"block_size": 0}, "block_size=0"),
        ({"bits": 4}, "unknown option 'bits'.*loftq_bits"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(init_lora_weights="loftq", loftq_config=options)
