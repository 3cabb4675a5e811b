"""Verdicts on LoftQ and QERA follow made-up figures, branch by branch."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel

from experiments.papers.loftq_iterations import closed_form, iterating
from experiments.papers.loftq_iterations.intervals import paired_mean, rank_correlations
from experiments.papers.loftq_iterations.starts import (
    DIAGONAL,
    LOFTQ,
    LOFTQ_QERA,
    PLAIN,
    QERA,
    QPISSA,
    SVD_FIRST,
)
from experiments.papers.verdicts import Verdict

CASES = [{"model": "m", "bits": bits, "rank": rank} for bits in (4, 2) for rank in (8, 32)]
REPRODUCED, DIRECTION = Verdict.REPRODUCED, Verdict.SAME_DIRECTION
NOT, CONTRADICTS = Verdict.NOT_REPRODUCED, Verdict.CONTRADICTS


@pytest.mark.parametrize(
    ("rising", "last", "verdict"),
    [(0, 0.8, REPRODUCED), (10, 0.8, DIRECTION), (100, 1.3, CONTRADICTS)],
)
def test_weights(rising, last, verdict):
    paths = pd.DataFrame(
        case | {"layer": layer, "iteration": t, "weight": value}
        for case, layer in itertools.product(CASES, range(100))
        for t, value in enumerate([1.0, 1.1 if layer < rising else 0.9, last], start=1)
    )
    assert iterating.weight_claim(paths).verdict is verdict


@pytest.mark.parametrize(("rising", "verdict"), [(6, REPRODUCED), (1, DIRECTION), (0, NOT)])
def test_outputs(rising, verdict):
    layers = pd.DataFrame(
        case
        | {"layer": n, "method": LOFTQ, "T": t, "weight": 1 - 0.1 * (t > 1)}
        | {"output": 1 + (0.2 if n < rising else -0.2) * (t > 1)}
        for case, n, t in itertools.product(CASES, range(100), (1, 2, 5, 10))
    )
    claim = iterating.output_claim(layers)
    assert claim.verdict is verdict
    assert "T = 5" in claim.ours


@pytest.mark.parametrize(("third", "verdict"), [(0.95, REPRODUCED), (0.904, DIRECTION), (0.8, NOT)])
def test_whole_model(third, verdict):
    models = pd.DataFrame(
        case | {"method": LOFTQ, "T": t, "error": value}
        for case in CASES
        for t, value in ((5, third if case["bits"] == 2 else 0.8), (2, 0.9), (1, 1.0))
    )
    claim = iterating.model_claim(models)
    assert claim.verdict is verdict
    if verdict is REPRODUCED:
        assert "2 of 4 settings; most at 2 bits" in claim.ours
        assert "0.9 at T = 2, 0.95 at T = 5" in claim.ours


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.03, REPRODUCED), (0.9, DIRECTION), (1.3, CONTRADICTS)]
)
def test_order(ratio, verdict):
    models = pd.DataFrame(
        case
        | {"method": method, "T": t}
        | dict.fromkeys(("weight", "output"), 1.0)
        | {"error": ratio if method == SVD_FIRST else 1.0}
        for case in CASES
        for method, t in ((LOFTQ, 1), (LOFTQ, 5), (SVD_FIRST, 5))
    )
    assert iterating.order_claim(models).verdict is verdict


@pytest.mark.parametrize(
    ("svd", "plain", "verdict"),
    [
        (0.02, 0.4, REPRODUCED),
        (0.15, 0.4, DIRECTION),
        (0.3, 0.4, NOT),
        (0.6, 0.4, CONTRADICTS),
        (0.0, -0.4, Verdict.NOT_JUDGED),
    ],
)
def test_training(svd, plain, verdict):
    shifts = {LOFTQ: 0.0, SVD_FIRST: svd, PLAIN: plain}
    trained = pd.DataFrame(
        {
            "method": method, "seed": seed, "sentence": n, "right": 1.0,
            "loss": 1 + shift * (1 + 0.1 * (-1) ** n) + 0.3 * n + seed,
        }
        for (method, shift), seed, n in itertools.product(shifts.items(), (0, 1), range(20))
    )  # fmt: skip
    assert iterating.training_claim(trained).verdict is verdict


@pytest.mark.parametrize(
    ("lower", "verdict"), [(4, REPRODUCED), (3, DIRECTION), (2, NOT), (0, CONTRADICTS)]
)
def test_lower_output_error(lower, verdict):
    models = pd.DataFrame(
        case | {"method": method, "T": t, "output": value}
        for n, case in enumerate(CASES)
        for method, t, value in (
            (QERA, 0, 0.8 if n < lower else 0.95), (LOFTQ, 1, 1.0), (LOFTQ, 5, 0.9),
        )
    )  # fmt: skip
    assert closed_form.lower_claim(models).verdict is verdict


@pytest.mark.parametrize(
    ("worse", "verdict"), [(0, REPRODUCED), (3, DIRECTION), (10, NOT), (60, CONTRADICTS)]
)
def test_own_base(worse, verdict):
    layers = pd.DataFrame(
        case | {"layer": n, "method": method, "T": t, "seen": value, "output": value}
        for case, n in itertools.product(CASES, range(100))
        for method, t, value in (
            (QERA, 0, 1.0), (PLAIN, 0, 2.0), (DIAGONAL, 0, 1.1),
            (LOFTQ, 1, 0.9 if n < worse else 1.2), (LOFTQ, 5, 0.1),
        )
    )  # fmt: skip
    assert closed_form.own_base_claim(layers).verdict is verdict


@pytest.mark.parametrize(
    ("below", "refit", "verdict"),
    [(0, 1.0, REPRODUCED), (2, 1.0, DIRECTION), (10, 1.0, CONTRADICTS), (0, 0.9, CONTRADICTS)],
)
def test_any_base(below, refit, verdict):
    layers = pd.DataFrame(
        case | {"layer": n, "method": method, "T": t, "seen": value}
        for case, n in itertools.product(CASES, range(100))
        for method, t, value in (
            (QERA, 0, 1.0), (LOFTQ, 1, 1.2), (LOFTQ, 5, 1.1), (SVD_FIRST, 5, 1.1),
            (QPISSA, 5, 0.9 if n < below else 1.0), (LOFTQ_QERA, 5, refit),
        )
    )  # fmt: skip
    assert closed_form.any_base_claim(layers).verdict is verdict


@pytest.mark.parametrize(
    ("qera", "verdict"),
    [(15.0, REPRODUCED), (17.9, DIRECTION), (19.9, DIRECTION), (21.0, CONTRADICTS)],
)
def test_perplexity(qera, verdict):
    models = pd.DataFrame(
        {"bits": bits, "method": method, "T": t, "perplexity": value}
        for bits in (4, 2)
        for method, t, value in (
            (QERA, 0, qera), (DIAGONAL, 0, 17.0), (PLAIN, 0, 20.0), (LOFTQ, 1, 19.0),
            (LOFTQ, 5, 17.5),
        )
    )  # fmt: skip
    claim = closed_form.perplexity_claim(models, original=10.0)
    assert claim.verdict is verdict
    assert f"wins back {(20 - qera) / 10:.0%}" in claim.ours


@pytest.mark.parametrize(
    ("shift", "spread", "verdict"),
    [
        (-0.2, 0.1, REPRODUCED),
        (-0.02, 0.1, DIRECTION),
        (0.02, 0.1, NOT),
        (0.2, 0.1, CONTRADICTS),
    ],
)
def test_diagonal(shift, spread, verdict):
    losses = pd.DataFrame(
        {"bits": 4, "method": method, "block": n, "loss": 3 + n + value}
        for n in range(8)
        for method, value in ((QERA, 0.0), (DIAGONAL, shift + spread * (-1) ** n))
    )
    models = pd.DataFrame({"bits": 4, "method": m, "output": 0.1} for m in (QERA, DIAGONAL, PLAIN))
    models["seen"] = 0.09
    assert closed_form.diagonal_claim(losses, models).verdict is verdict


def starts_with(follows: str, noise: float) -> pd.DataFrame:
    generator = np.random.default_rng(3)
    rows = []
    for case in CASES:
        for _ in range(12):
            row = {"weight": generator.uniform(), "output": generator.uniform()}
            rows.append(case | row | {"error": row[follows] + noise * generator.normal()})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("follows", "noise", "verdict"),
    [("output", 0.05, REPRODUCED), ("output", 3.0, DIRECTION), ("weight", 0.05, CONTRADICTS)],
)
def test_correlation(follows, noise, verdict):
    models = starts_with(follows, noise)
    claim = closed_form.correlation_claim(models, models, seed=0)
    assert claim.verdict is verdict


def test_rank_correlations_are_means_over_groups():
    models = starts_with("output", 0.0)
    found = rank_correlations(models, seed=0)
    assert found.output.value == pytest.approx(1)
    assert found.output.low == pytest.approx(1)
    by_group = [
        group[["weight", "error"]].rank().corr().iloc[0, 1]
        for _, group in models.groupby(["bits", "rank"])
    ]
    assert found.weight.value == pytest.approx(np.mean(by_group))
    assert found.weight.low < found.weight.value < found.weight.high


def test_paired_mean_is_students():
    one, two = np.random.default_rng(0).normal(size=(2, 12))
    expected = ttest_rel(one, two).confidence_interval(0.95)
    found = paired_mean(pd.Series(one - two))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert paired_mean(pd.Series([0.5])).show() == "+0.500 [+0.500, +0.500]"
