"""Tests of the reproduction of sharpness: Lanczos, Hessian products and every verdict."""

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
from experiments.papers import sharpness as page
from experiments.papers import sharpness_rows as rows_of
from experiments.papers.claim import Verdict
from experiments.papers.interval import Interval
from experiments.papers.reproduction import Measurement
from experiments.papers.sharpness_rows import Curvature, extreme_eigenvalues, protocol_rates
from experiments.papers.starts import adapted
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
def test_eigenvalues_equal_those_of_a_dense_solver(values):
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


def test_it_stops_at_its_bound_and_the_bound_holds():
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


def test_an_operator_without_a_spectrum_is_refused():
    with pytest.raises(ValueError, match="start=0 is not supported"):
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
    assert parameters == rows_of.adapter_parameters(model)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    return Curvature(loss, parameters), loss_at, flat


def test_products_equal_those_of_the_dense_hessian(tiny):
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


def test_the_first_step_of_adam_minimizes_a_quadratic():
    made = [("one", 0, 2.0, 3.0), ("one", 1, 4.0, 5.0), ("down", 0, 1.0, 1.0), ("down", 1, 1.0, -2)]
    rows = pd.DataFrame(made, columns=["method", "batch", "slope", "bend"]).assign(head="new")
    found = page.first_steps(rows, "new")
    assert set(found) == {"one"}
    grid = np.linspace(0.01, 3, 300)
    fall = np.mean([grid * 2 - grid**2 * 3 / 2, grid * 4 - grid**2 * 5 / 2], axis=0)
    assert found["one"] == pytest.approx(grid[fall.argmax()], abs=0.01)


def test_a_start_adapts_all_but_the_head_and_restores_the_base():
    device = torch.device("cpu")
    subject = rows_of.load_classifier("minilm", 0, device)
    assert subject.model.config._attn_implementation == "eager"
    batches = list(rows_of.draw_batches(subject, count=2, size=3, length=8, seed=0, device=device))
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    logits = subject.model(**batches[0]).logits
    config = LoraConfig(
        r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights="olora"
    )
    with adapted(subject.model, config, "olora", keep_original=True) as model:
        parameters = rows_of.adapter_parameters(model)
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert len(parameters) == 2 * len(model.layers)
        assert len(trained) == len(parameters) + 2  # the head's weight and bias
        torch.testing.assert_close(model(**batches[0]).logits, logits, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in subject.model.parameters())
    for name, value in subject.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    first = float(subject.model(**batches[1]).loss)
    assert rows_of.train_head(subject, iter([batches[1]] * 5)) < first
    changed = [
        name
        for name, value in subject.model.state_dict().items()
        if not torch.allclose(value, before[name], atol=1e-5)
    ]
    assert changed
    assert all(name.startswith("classifier.") for name in changed)


def judged(rows: pd.DataFrame, rates: dict[str, float]) -> list:
    known = pd.DataFrame(rates.items(), columns=["method", "rate"])
    return page.judge_all(Measurement(None, {"starts": rows, "rates": known}, {}))


def measured(**factors: dict[str, float]) -> pd.DataFrame:
    """The given ratios by head and method, on batches of very different curvature."""
    return pd.DataFrame(
        {
            "method": method,
            "head": head,
            "batch": batch,
            "largest": size * factor,
            "smallest": -size * factor * (1 if head == "new" else 0.5),
            "slope": 1.0,
            "bend": factor,
            "gradient": 1.0,
        }
        for head, by_method in factors.items()
        for batch, size in enumerate((1.0, 10.0, 100.0))
        for method, factor in {"kaiming": 1, **by_method}.items()
    )


def test_ratios_are_paired_over_batches():
    found = page.ratios(measured(new={"pissa": 10, "odd": -1}), "new")
    assert set(found) == {"kaiming", "pissa"}
    assert (found["pissa"].low, found["pissa"].high) == pytest.approx((10, 10))


def test_a_trained_head_decides_ratios_and_a_new_one_rates():
    trained = {"olora": 50, "lora_ga": 90, "pissa": 10, "milora": 2, "init_ab": 2}
    rows = measured(new=dict.fromkeys(trained, 1) | {"olora": 4, "pissa": 2}, trained=trained)
    rates = {"kaiming": 4.0, "milora": 5.0, "pissa": 2.0, "olora": 1.0}
    found = judged(rows, rates)
    assert [claim.verdict for claim in found[:3]] == [Verdict.REPRODUCED] * 3
    assert "Under a new head, as sweeps begin: olora 4, lora_ga 1." in found[0].remark
    assert "4 methods" in found[3].ours
    assert "Of lora_ga, init_ab no best rate is known" in found[3].remark
    for claim in found:
        assert "contradicts: " in claim.criterion


def test_eigenvalues_that_did_not_converge_are_counted(composed_paper):
    settings = composed_paper("sharpness", "smoke")
    rows = pd.DataFrame({"converged": [True, False, True], "residual": [0.1, 0.4, 0.2]})
    words = rows_of.precision(rows, settings)
    assert "so in 2 of 3 cases; the largest residual is 0.4 of it" in words


def test_the_p_value_counts_all_orders():
    values = dict(zip("abcdef", (1, 2, 3, 4, 5, 7), strict=True))
    rates = dict(zip("abcdef", (9, 8, 6, 6, 1, 2), strict=True))
    found = page.correlate(values, rates)
    x, y = [np.argsort(np.argsort(list(values.values()))), [6.0, 5.0, 3.5, 3.5, 1.0, 2.0]]
    every = [np.corrcoef(x, order)[0, 1] for order in permutations(y)]
    assert found.coefficient == pytest.approx(np.corrcoef(x, y)[0, 1])
    below = np.mean(np.array(every) <= found.coefficient + 1e-12)
    assert found.p_value == pytest.approx(min(1.0, 2 * below))
    assert page.correlate(values, {"a": 1.0, "b": 2.0, "z": 3.0}) is None


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
    assert page.sharpest_claim(found, {}).verdict == verdict
    assert page.sharpest_claim({}, {}) is None


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
    assert page.pissa_claim(exact(pissa=value), {}).verdict == verdict


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
    assert page.mild_claim(exact(milora=milora, init_ab=init_ab), {}).verdict == verdict


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
    claim = page.correlation_claim(found, dict(zip("abcdef", rates, strict=True)), {})
    assert claim.verdict == verdict


def record(folder, selected) -> str:
    (folder / "protocol.json").write_text(json.dumps({"selected": selected}))
    return str(folder)


def test_a_protocol_gives_its_rates_at_the_rank(tmp_path):
    keys = ("arm", "method", "rank", "learning_rate")
    chosen = [
        ("kaiming", "kaiming", 8, 3e-3),
        ("kaiming", "kaiming", 32, 1e-3),
        ("rslora", "kaiming", 8, 9e-3),
        ("eva", "eva", 8, 5e-4),
    ]
    selected = {str(n): dict(zip(keys, case, strict=True)) for n, case in enumerate(chosen)}
    folder = record(tmp_path, selected)
    assert protocol_rates(folder, 8) == {"kaiming": 3e-3, "eva": 5e-4}
    with pytest.raises(ConfigurationError, match="no rates at rank=128: must be one of 8, 32"):
        protocol_rates(folder, 128)
    with pytest.raises(ConfigurationError, match="cannot read"):
        protocol_rates(record(tmp_path, {"x": {"rank": 8}}), 8)
    with pytest.raises(ConfigurationError, match="must be the folder of a sweep"):
        protocol_rates(str(tmp_path / "none"), 8)


@pytest.mark.parametrize(
    "override",
    [
        "methods=[kaiming,pisa]",
        "methods=[pissa]",
        "batches=0",
        "tolerance=0",
        "scaling=0",
        "best_rates.eva=0",
    ],
)
def test_unsupported_options_are_refused(composed_paper, override):
    with pytest.raises(ConfigurationError, match=f"{override.split('=')[0].split('.')[0]}=.*must"):
        composed_paper("sharpness", "fast", override)
