"""Textbook computations and errors against small computations by hand."""

import pytest
import torch

from experiments.benchmark.contenders import LayerFactors
from experiments.benchmark.powerlaw import PowerLaw
from experiments.benchmark.quality import JUDGES, excess, subspace_error, worst_error
from experiments.benchmark.reference import FORMULAS, LARGEST, Given, Truth
from experiments.benchmark.strategies import METHODS, STRATEGIES
from lora_init.quantization import Quantizer


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    rows = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    return Given(weight, 2, rows.T @ rows / 50, torch.cov(rows.T), weight.flip(0))


@pytest.mark.parametrize(
    ("formula", "matrix"),
    [
        ("svd of W", lambda given: given.weight),
        ("svd of W R", lambda given: given.weight @ given.moment),
        ("svd of W R lifted", lambda given: given.weight @ given.moment),
        ("svd of G", lambda given: given.gradient),
        ("eigh", lambda given: given.covariance),
    ],
)
def test_formula_finds_the_first_and_last_vectors(given, formula, matrix):
    left = torch.linalg.svd(matrix(given))[0][:, :6]
    found, truth = FORMULAS[formula](given.to(torch.float32)), Truth({})
    assert subspace_error(found[:, :2], left[:, :2]) < 1e-9
    assert subspace_error(truth.first("layer", formula, given, 2), left[:, :2]) < 1e-9
    assert subspace_error(truth.last("layer", formula, given, 2), left[:, -2:]) < 1e-9


def test_alternation_reduces_the_quantization_error(given):
    weight = given.weight.float()
    plain = float((weight - Quantizer().roundtrip(weight)).norm())
    assert 0 < float(FORMULAS["alternation"](given)) < plain


def test_known_spectra_need_no_decomposition():
    made = PowerLaw(12, 8, "layer")
    given = Given(made.weight(), 2)
    found = Truth({"layer": made}).first("layer", "svd of W", given, 2)
    assert subspace_error(found, torch.linalg.svd(given.weight)[0][:, :2]) < 1e-8


def test_a_large_layer_has_no_reference(given, monkeypatch):
    monkeypatch.setitem(LARGEST, "cpu", 1)
    layer = LayerFactors(torch.zeros(2, 6), torch.zeros(9, 2), 1.0, torch.zeros(9, 6))
    for method in set(JUDGES) - {"olora"}:
        assert worst_error(method, {"layer": layer}, {"layer": given}, Truth({})) is None


def test_excess_compares_with_the_best_rank():
    weight = torch.diag(torch.tensor([5.0, 4.0, 3.0])).double()
    second = torch.zeros(3, 3).double()
    second[1, 1] = 4.0
    found = excess(weight, second, torch.eye(3).double()[:, :1])
    assert found == pytest.approx(34**0.5 / 5 - 1)  # sqrt(5² + 3²) remains, sqrt(4² + 3²) is best


@pytest.mark.parametrize(("columns", "error"), [([0, 1], 0.0), ([1, 2], 0.5), ([2, 3], 1.0)])
def test_subspace_error(columns, error):
    axes = torch.eye(4)
    assert subspace_error(axes[:, columns], axes[:, :2]) == pytest.approx(error)


def test_the_worst_layer_counts(given):
    left, values, right = torch.linalg.svd(given.weight, full_matrices=False)
    best = LayerFactors(values[:2, None] * right[:2], left[:, :2], 1.0, given.weight)
    other = LayerFactors(values[1:3, None] * right[1:3], left[:, 1:3], 1.0, given.weight)
    layers = {"a": given, "b": given}
    assert worst_error("pissa", {"a": best, "b": best}, layers, Truth({})) == pytest.approx(0)
    assert worst_error("pissa", {"a": best, "b": other}, layers, Truth({})) > 0.01


def test_every_method_that_computes_has_an_error():
    random = {"kaiming", "gaussian", "orthogonal"}
    assert set(METHODS) - random == set(JUDGES)
    for method in METHODS:
        formula = STRATEGIES[method].formula
        assert formula is None or formula in FORMULAS
