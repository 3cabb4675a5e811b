"""Sharpness: Lanczos and Hessian products against dense float64, and what is said of them."""

from __future__ import annotations

import json
import math
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

from experiments.errors import ConfigurationError
from experiments.papers.claim import Verdict
from experiments.papers.interval import Interval
from experiments.papers.sharpness import claims, measurement, starts
from experiments.papers.sharpness.best_rates import protocol_rates
from experiments.papers.sharpness.claims import correlate
from experiments.papers.sharpness.curvature import Curvature
from experiments.papers.sharpness.lanczos import extreme_eigenvalues
from lora_init import LoraConfig, get_peft_model


def symmetric(values: list[float], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


def start_of(size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    "values",
    [
        [*np.linspace(-3, 1, 59).tolist(), 7.0],
        list(-np.linspace(2, 50, 60)),  # all negative: the largest is not the largest in size
        [0.0] * 50 + [4.9, 5.0, -5.0],
        [2.0] * 30 + [3.0] * 30,  # two values: the Krylov space has two dimensions
    ],
)
def test_the_ends_are_those_of_a_dense_solver(values):
    matrix = symmetric(values)
    found = extreme_eigenvalues(
        lambda v: matrix @ v, start_of(len(values)), tolerance=1e-9, limit=100
    )
    dense = np.linalg.eigvalsh(matrix.numpy())
    assert found.largest == pytest.approx(dense[-1], rel=1e-8, abs=1e-8)
    # Only the largest decides when to stop; a Ritz value never lies below the spectrum.
    assert dense[0] - 1e-9 <= found.smallest <= dense[0] + 0.05 * abs(dense[0])
    (sparse,) = eigsh(matrix.numpy(), k=1, which="LA", return_eigenvectors=False)
    assert found.largest == pytest.approx(sparse, rel=1e-8, abs=1e-8)


def test_it_stops_where_its_bound_says_so_and_the_bound_holds():
    values = list(np.linspace(0, 1, 200))
    matrix = symmetric(values)
    products = []
    for tolerance in (0.3, 0.03, 0.003):
        found = extreme_eigenvalues(
            lambda v: matrix @ v, start_of(200), tolerance=tolerance, limit=200
        )
        assert found.converged
        assert found.error <= tolerance * found.largest
        assert min(abs(found.largest - value) for value in values) <= found.error
        products.append(found.products)
    assert products == sorted(set(products))
    short = extreme_eigenvalues(lambda v: matrix @ v, start_of(200), tolerance=1e-9, limit=3)
    assert not short.converged
    assert short.products == 3


def test_what_has_no_spectrum_is_refused():
    with pytest.raises(ValueError, match="start is zero"):
        extreme_eigenvalues(lambda v: v, torch.zeros(3), tolerance=0.1, limit=3)
    with pytest.raises(ValueError, match="not finite"):
        extreme_eigenvalues(lambda v: v * math.nan, torch.ones(3), tolerance=0.1, limit=3)


@pytest.fixture(params=["kaiming", "pissa", "init_ab"])
def tiny(request):
    """An adapted network in float64, its trained parameters, and its loss as their function."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["0", "2"], init_lora_weights=request.param
    )
    model = get_peft_model(base, config, seed=0, cache=False).double()
    inputs, labels = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 3
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss_at(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([p.numel() for p in named.values()])
        values = {n: part.view_as(p) for (n, p), part in zip(named.items(), parts, strict=True)}
        outputs = torch.func.functional_call(model, values, (inputs,))
        return nn.functional.cross_entropy(outputs, labels)

    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    parameters = list(named.values())
    assert parameters == starts.adapter_parameters(model)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    return Curvature(loss, parameters), loss_at, flat


def test_products_are_those_of_the_dense_hessian(tiny):
    local, loss_at, flat = tiny
    dense = torch.autograd.functional.hessian(loss_at, flat)
    gradient = torch.autograd.functional.jacobian(loss_at, flat)
    torch.testing.assert_close(local.gradient, gradient)
    vector = start_of(len(flat))
    torch.testing.assert_close(local.times(vector), dense @ vector)
    found = extreme_eigenvalues(local.times, vector, tolerance=1e-9, limit=len(flat))
    assert found.largest == pytest.approx(np.linalg.eigvalsh(dense.numpy())[-1])
    operator = LinearOperator(
        dense.shape, lambda v: local.times(torch.from_numpy(v.reshape(-1))).numpy(), dtype=float
    )
    (sparse,) = eigsh(operator, k=1, which="LA", return_eigenvectors=False)
    assert found.largest == pytest.approx(sparse)
    direction = gradient.sign()
    bend = direction @ dense @ direction
    assert local.along_signs() == pytest.approx((float(gradient.abs().sum()), float(bend)))


def test_the_first_step_of_adam_is_where_a_quadratic_falls_most():
    made = [("one", 0, 2.0, 3.0), ("one", 1, 4.0, 5.0), ("down", 0, 1.0, 1.0), ("down", 1, 1.0, -2)]
    rows = pd.DataFrame(made, columns=["method", "batch", "slope", "bend"]).assign(head="new")
    found = claims.first_steps(rows, "new")
    assert set(found) == {"one"}
    grid = np.linspace(0.01, 3, 300)
    fall = np.mean([grid * 2 - grid**2 * 3 / 2, grid * 4 - grid**2 * 5 / 2], axis=0)
    assert found["one"] == pytest.approx(grid[fall.argmax()], abs=0.01)


def test_a_start_adapts_everything_but_the_head_and_gives_the_base_back():
    device = torch.device("cpu")
    subject = starts.load_classifier("minilm", 0, device)
    assert subject.model.config._attn_implementation == "eager"
    batches = list(starts.draw_batches(subject, count=2, size=3, length=8, seed=0, device=device))
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    logits = subject.model(**batches[0]).logits
    with starts.started(subject, "olora", rank=4, scaling=2.0, calibration=[], seed=0) as model:
        parameters = starts.adapter_parameters(model)
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert len(parameters) == 2 * len(model.layers)
        assert len(trained) == len(parameters) + 2  # the head's weight and bias
        torch.testing.assert_close(model(**batches[0]).logits, logits, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in subject.model.parameters())
    for name, value in subject.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    first = float(subject.model(**batches[1]).loss)
    assert starts.train_head(subject, iter([batches[1]] * 5)) < first
    changed = [
        name for name, value in subject.model.state_dict().items()
        if not torch.allclose(value, before[name], atol=1e-5)
    ]  # fmt: skip
    assert changed
    assert all(name.startswith("classifier.") for name in changed)


def test_a_method_without_what_it_needs_is_named():
    subject = starts.load_classifier("minilm", 0, torch.device("cpu"))
    start = starts.started(subject, "eva", rank=4, scaling=2.0, calibration=[], seed=0)
    with pytest.raises(ConfigurationError, match="methods=eva:"), start:
        pass


def measured(**factors: dict[str, float]) -> pd.DataFrame:
    """By head and method, λmax over kaiming's, alike on batches of very different curvature."""
    return pd.DataFrame(
        {"method": method, "head": head, "batch": batch, "largest": size * factor,
         "smallest": -size * factor * (1 if head == "new" else 0.5), "slope": 1.0,
         "bend": factor, "gradient": 1.0}
        for head, by_method in factors.items()
        for batch, size in enumerate((1.0, 10.0, 100.0))
        for method, factor in {"kaiming": 1, **by_method}.items()
    )  # fmt: skip


def test_ratios_are_paired_over_batches():
    found = claims.ratios(measured(new={"pissa": 10, "odd": -1}), "new")
    assert set(found) == {"kaiming", "pissa"}
    assert (found["pissa"].low, found["pissa"].high) == pytest.approx((10, 10))


def test_ratios_are_judged_under_a_trained_head_and_rates_under_a_new_one():
    trained = {"olora": 50, "lora_ga": 90, "pissa": 10, "milora": 2, "init_ab": 2}
    rows = measured(new=dict.fromkeys(trained, 1) | {"olora": 4, "pissa": 2}, trained=trained)
    rates = {"kaiming": 4.0, "milora": 5.0, "pissa": 2.0, "olora": 1.0}
    found = claims.claims(rows, rates)
    assert [claim.verdict for claim in found[:3]] == [Verdict.REPRODUCED] * 3
    assert "Under a new head, as sweeps begin: olora 4, lora_ga 1." in found[0].remark
    assert "4 methods" in found[3].ours
    assert "Of lora_ga, init_ab no best rate is known" in found[3].remark
    for claim in found:
        assert "contradicts: " in claim.criterion


def test_the_ends_are_a_pair_where_their_quotient_says_so():
    rows = measured(new={"pissa": 2}, trained={"pissa": 2})
    told = claims.saddles(rows, ["new", "trained"])
    assert "λmin over λmax is -1.00 (new head), -0.50 (trained head)." in told
    assert "Near −1 (new head) λmax is the cross term" in told
    assert "cross term" not in claims.saddles(rows, ["trained"])


def test_eigenvalues_that_the_limit_cut_short_are_counted(composed_paper):
    settings = composed_paper("sharpness", "smoke")
    rows = pd.DataFrame({"converged": [True, False, True], "products": [3, 60, 5],
                         "residual": [0.1, 0.4, 0.2]})  # fmt: skip
    told = measurement.precision(rows, settings)
    assert "so in 2 of 3 cases, after 3 to 60 products; 1 stopped at 60 products" in told
    assert "residual up to 0.4 of the eigenvalue" in told
    assert "stopped" not in measurement.precision(rows[rows["converged"]], settings)


def test_the_p_value_counts_all_orders():
    values = dict(zip("abcdef", (1, 2, 3, 4, 5, 7), strict=True))
    rates = dict(zip("abcdef", (9, 8, 6, 6, 1, 2), strict=True))
    found = correlate(values, rates)
    x, y = [np.argsort(np.argsort(list(values.values()))), [6.0, 5.0, 3.5, 3.5, 1.0, 2.0]]
    every = [np.corrcoef(x, order)[0, 1] for order in permutations(y)]
    assert found.coefficient == pytest.approx(np.corrcoef(x, y)[0, 1])
    below = np.mean(np.array(every) <= found.coefficient + 1e-12)
    assert found.p_value == pytest.approx(min(1.0, 2 * below))
    assert correlate(values, {"a": 1.0, "b": 2.0, "z": 3.0}) is None


def within(margin: float, **values: float) -> dict[str, Interval]:
    return {name: Interval(v, v / margin, v * margin) for name, v in values.items()}


def exact(**values: float) -> dict[str, Interval]:
    return within(1.1, **values)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (exact(olora=50, lora_ga=90, pissa=10), Verdict.REPRODUCED),
        (exact(olora=5, lora_ga=90, pissa=10), Verdict.SAME_DIRECTION),
        (exact(olora=50, lora_ga=90, pissa=70), Verdict.SAME_DIRECTION),
        (exact(olora=5, lora_ga=1, pissa=10), Verdict.NOT_REPRODUCED),
        (within(60, olora=50, lora_ga=90, pissa=10), Verdict.NOT_REPRODUCED),
        (exact(olora=0.5, lora_ga=0.5, pissa=10), Verdict.CONTRADICTS),
    ],
)
def test_verdict_on_the_sharpest(found, verdict):
    assert claims.sharpest_claim(found, {}).verdict is verdict
    assert claims.sharpest_claim({}, {}) is None


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (8, Verdict.REPRODUCED),
        (30, Verdict.SAME_DIRECTION),
        (1, Verdict.NOT_REPRODUCED),
        (0.3, Verdict.CONTRADICTS),
    ],
)
def test_verdict_on_pissa(value, verdict):
    assert claims.pissa_claim(exact(pissa=value), {}).verdict is verdict


def test_an_interval_that_reaches_below_lora_reproduces_nothing():
    wide = within(10, pissa=8, milora=2, init_ab=2)
    assert claims.pissa_claim(wide, {}).verdict is Verdict.NOT_REPRODUCED
    assert claims.mild_claim(wide, {}).verdict is Verdict.NOT_REPRODUCED


@pytest.mark.parametrize(
    ("milora", "init_ab", "verdict"),
    [
        (2, 3, Verdict.REPRODUCED),
        (6, 1.15, Verdict.SAME_DIRECTION),
        (2, 1.05, Verdict.NOT_REPRODUCED),
        (0.5, 2, Verdict.NOT_REPRODUCED),
        (0.5, 0.5, Verdict.CONTRADICTS),
    ],
)
def test_verdict_on_the_mild(milora, init_ab, verdict):
    assert claims.mild_claim(exact(milora=milora, init_ab=init_ab), {}).verdict is verdict


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [
        ((6, 5, 4, 3, 2, 1), Verdict.REPRODUCED),
        ((5, 6, 1, 4, 3, 2), Verdict.SAME_DIRECTION),
        ((3, 1, 2, 5, 4, 3.5), Verdict.NOT_REPRODUCED),
        ((1, 2, 3, 4, 5, 6), Verdict.CONTRADICTS),
    ],
)
def test_verdict_on_the_correlation(rates, verdict):
    found = exact(a=1, b=2, c=3, d=4, e=5, f=6)
    claim = claims.correlation_claim(found, dict(zip("abcdef", rates, strict=True)), {})
    assert claim.verdict is verdict


def record(folder, selected) -> str:
    (folder / "protocol.json").write_text(json.dumps({"selected": selected}))
    return str(folder)


def test_a_protocol_gives_its_rates_at_the_rank(tmp_path):
    chosen = {
        "kaiming r=8": {"arm": "kaiming", "method": "kaiming", "rank": 8, "learning_rate": 3e-3},
        "kaiming r=32": {"arm": "kaiming", "method": "kaiming", "rank": 32, "learning_rate": 1e-3},
        "rslora": {"arm": "rslora", "method": "kaiming", "rank": 8, "learning_rate": 9e-3},
        "eva": {"arm": "eva", "method": "eva", "rank": 8, "learning_rate": 5e-4},
    }
    folder = record(tmp_path, chosen)
    assert protocol_rates(folder, 8) == {"kaiming": 3e-3, "eva": 5e-4}
    with pytest.raises(ConfigurationError, match="nothing chosen at rank 128; its ranks are 8, 32"):
        protocol_rates(folder, 128)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        protocol_rates(record(tmp_path, {"x": {"rank": 8}}), 8)
    with pytest.raises(ConfigurationError, match="no protocol.json there"):
        protocol_rates(str(tmp_path / "none"), 8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods=[kaiming,pisa]", "methods: 'pisa' is unknown; did you mean 'pissa'"),
        ("methods=[pissa]", r"methods=\['pissa'\]; allowed are different names with kaiming"),
        ("batches=0", "batches=0; allowed are integers >= 1"),
        ("trained_batches=0", "trained_batches=0; allowed are integers >= 1"),
        ("tolerance=0", "tolerance=0.0; allowed are numbers between 0 and 1"),
        ("scaling=0", "scaling=0.0; allowed are finite numbers > 0"),
        ("best_rates.eva=0", "best_rates.eva=0.0; allowed are finite rates > 0"),
    ],
)
def test_bad_settings_are_refused_by_name(composed_paper, override, message):
    with pytest.raises(ConfigurationError, match=message):
        composed_paper("sharpness", "fast", override)
