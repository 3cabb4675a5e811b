"""Verdicts on LoftQ and QERA follow made-up figures, branch by branch."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from experiments.papers import loftq_iterations_closed_form_claims as closed_form_claims
from experiments.papers import loftq_iterations_iteration_claims as iteration_claims
from experiments.papers.claim import Verdict
from experiments.papers.loftq_iterations_closed_form_claims import rank_correlations
from experiments.papers.loftq_iterations_starts import (
    DIAGONAL,
    LOFTQ,
    LOFTQ_QERA,
    PLAIN,
    QERA,
    QPISSA,
    SVD_FIRST,
)

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
    assert iteration_claims.weight_claim(paths).verdict is verdict


@pytest.mark.parametrize(("rising", "verdict"), [(6, REPRODUCED), (1, DIRECTION), (0, NOT)])
def test_outputs(rising, verdict):
    layers = pd.DataFrame(
        case
        | {"layer": n, "method": LOFTQ, "T": t, "weight": 1 - 0.1 * (t > 1)}
        | {"output": 1 + (0.2 if n < rising else -0.2) * (t > 1)}
        for case, n, t in itertools.product(CASES, range(100), (1, 2, 5, 10))
    )
    claim = iteration_claims.output_claim(layers)
    assert claim.verdict is verdict
    assert "T = 5" in claim.ours


@pytest.mark.parametrize(
    ("rise", "noise", "verdict"),
    [(1.05, 0.01, REPRODUCED), (1.05, 0.2, DIRECTION), (0.9, 0.01, NOT)],
)
def test_whole_model(rise, noise, verdict):
    """From T = 2 to T = 5 at 2 bits and rank 8 the model's error rises, in all others it falls."""
    generator = np.random.default_rng(0)
    rows = []
    for case, text in itertools.product(CASES, range(40)):
        last = rise if (case["bits"], case["rank"]) == (2, 8) else 0.8
        error = 1.0 + text % 3
        for t, factor in ((1, 1.0), (2, 0.9), (5, last)):
            error *= factor * (np.exp(noise * generator.normal()) if t == 5 else 1)
            rows.append(case | {"method": LOFTQ, "T": t, "text": text, "error": error})
    claim = iteration_claims.model_claim(pd.DataFrame(rows))
    assert claim.verdict is verdict
    if verdict is REPRODUCED:
        assert "rises in 1 of 8 steps" in claim.ours
        assert "2 bits, r = 8 on m, T = 2 → 5, +5." in claim.ours


def test_the_largest_of_many_rises_is_judged_on_other_texts():
    """A step that rises on even texts only, by chance as it were, is no rise."""
    rows = [
        case | {"method": LOFTQ, "T": t, "text": text, "error": error}
        for case, text in itertools.product(CASES, range(20))
        for t, error in ((1, 1.0), (5, 1.3 if text % 2 == 0 and case["rank"] == 8 else 0.9))
    ]
    claim = iteration_claims.model_claim(pd.DataFrame(rows))
    assert claim.verdict is NOT
    assert "-10.0 % on the other texts" in claim.ours


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [(1.03, REPRODUCED), (0.9, DIRECTION), (1.2, NOT), (0.8, NOT), (1.35, CONTRADICTS)],
)
def test_order(ratio, verdict):
    models = pd.DataFrame(
        case
        | {"method": method, "T": t}
        | dict.fromkeys(("weight", "output"), 1.0)
        | {"error": (ratio if case["bits"] == 2 else 2.0) if method == SVD_FIRST else 1.0}
        for case in CASES
        for method, t in ((LOFTQ, 1), (LOFTQ, 5), (SVD_FIRST, 5))
    )
    claim = iteration_claims.order_claim(models)
    assert claim.verdict is verdict
    assert "At 4 bits: weights +0.0%, layer outputs +0.0%, whole model +100.0%" in claim.ours


@pytest.mark.parametrize(
    ("svd", "plain", "wrong", "verdict"),
    [
        (0.02, 0.4, 0, REPRODUCED),
        (0.15, 0.4, 0, DIRECTION),
        (0.3, 0.4, 0, NOT),
        (0.6, 0.4, 0, CONTRADICTS),
        (0.0, -0.4, 0, Verdict.NOT_JUDGED),
        (0.02, 0.4, 8, Verdict.NOT_JUDGED),
    ],
)
def test_training(svd, plain, wrong, verdict):
    """The first `wrong` of 20 sentences are not classified; the more frequent label has half."""
    shifts = {LOFTQ: 0.0, SVD_FIRST: svd, PLAIN: plain}
    trained = pd.DataFrame(
        {
            "method": method, "seed": seed, "text": n, "right": float(n >= wrong), "chance": 0.5,
            "loss": 1 + shift * (1 + 0.1 * (-1) ** n) + 0.3 * n + seed,
        }
        for (method, shift), seed, n in itertools.product(shifts.items(), (0, 1), range(20))
    )  # fmt: skip
    claim = iteration_claims.training_claim(trained)
    assert claim.verdict is verdict
    if wrong:
        assert "accuracy, quantize first 60.0 [36.5, 83.5] %" in claim.ours


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
    assert closed_form_claims.lower_claim(models).verdict is verdict


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
    assert closed_form_claims.own_base_claim(layers).verdict is verdict


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
    assert closed_form_claims.any_base_claim(layers).verdict is verdict


@pytest.mark.parametrize(
    ("up", "noise", "ratio", "verdict"),
    [
        (0, 0.01, 0.8, REPRODUCED),
        (3, 0.01, 0.8, DIRECTION),
        (0, 0.5, 0.95, DIRECTION),
        (0, 0.01, 1.1, NOT),
        (20, 0.01, 0.8, NOT),
        (80, 0.01, 0.8, CONTRADICTS),
    ],
)
def test_ranks(up, noise, ratio, verdict):
    """The first `up` of 100 layers rise with the rank; the model's error by `ratio`."""
    layers = pd.DataFrame(
        case | {"layer": n, "method": QERA, "T": 0} | dict.fromkeys(("seen", "output"), value)
        for case, n in itertools.product(CASES, range(100))
        for value in [1.0 if case["rank"] == 8 else 1.2 if n < up else 0.7]
    )
    texts = pd.DataFrame(
        case | {"text": n, "method": QERA, "T": 0, "error": (1 + n) * value}
        for case, n in itertools.product(CASES, range(10))
        for value in [1.0 if case["rank"] == 8 else ratio * np.exp(noise * (-1) ** n)]
    )
    assert closed_form_claims.rank_claim(layers, texts).verdict is verdict
    alone = layers[layers["rank"] == 8], texts[texts["rank"] == 8]
    assert closed_form_claims.rank_claim(*alone).verdict is Verdict.NOT_JUDGED


def language(losses: dict, noise: float = 0.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of eight blocks at two ranks and bits, from the losses at 4 bits and rank 32.

    QERA's losses scatter by `noise` from block to block; everything else is far away.
    """
    models, texts = [], []
    for case in CASES:
        judged = (case["bits"], case["rank"]) == (4, 32)
        for (method, t), loss in losses.items():
            row = case | {"method": method, "T": t}
            moved = loss if judged else 9.0
            models.append(row | {"perplexity": np.exp(moved), "output": 0.1, "seen": 0.09})
            texts += [
                row | {"text": n, "loss": moved + n + (method == QERA) * noise * (-1) ** n}
                for n in range(8)
            ]
    return pd.DataFrame(models), pd.DataFrame(texts)


@pytest.mark.parametrize(
    ("qera", "noise", "verdict"),
    [
        (2.6, 0.01, REPRODUCED),
        (2.6, 0.2, DIRECTION),
        (2.85, 0.01, DIRECTION),
        (2.98, 0.1, NOT),
        (3.1, 0.01, CONTRADICTS),
    ],
)
def test_perplexity(qera, noise, verdict):
    losses = {(QERA, 0): qera, (DIAGONAL, 0): 2.8, (PLAIN, 0): 3.0, (LOFTQ, 1): 2.9}
    models, texts = language(losses | {(LOFTQ, 5): 2.7}, noise)
    claim = closed_form_claims.perplexity_claim(models, texts, original=np.exp(2.3))
    assert claim.verdict is verdict
    won = (np.exp(3.0) - np.exp(qera)) / (np.exp(3.0) - np.exp(2.3))
    assert f"wins back {won:.0%}" in claim.ours
    assert "r = 32" in claim.ours


@pytest.mark.parametrize(
    ("shift", "noise", "verdict"),
    [
        (-0.2, 0.1, REPRODUCED),
        (-0.02, 0.1, DIRECTION),
        (0.02, 0.1, NOT),
        (0.2, 0.1, CONTRADICTS),
    ],
)
def test_diagonal(shift, noise, verdict):
    losses = {(QERA, 0): 3.0, (DIAGONAL, 0): 3.0 + shift, (PLAIN, 0): 4.0}
    models, texts = language(losses, noise)
    assert closed_form_claims.diagonal_claim(texts, models).verdict is verdict


def starts_with(follows: list[str]) -> pd.DataFrame:
    """Twelve starts a case, whose model's error follows the case's one of the layers' errors."""
    generator = np.random.default_rng(3)
    rows = []
    for case, name in zip(CASES, follows, strict=True):
        for _ in range(12):
            row = {"weight": generator.uniform(), "output": generator.uniform()}
            rows.append(case | row | {"error": row[name] + 0.05 * generator.normal()})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("outputs", "verdict"), [(4, REPRODUCED), (3, DIRECTION), (1, NOT), (0, CONTRADICTS)]
)
def test_correlation(outputs, verdict):
    models = starts_with(["output"] * outputs + ["weight"] * (4 - outputs))
    assert closed_form_claims.correlation_claim(models).verdict is verdict
    few = models.groupby(["bits", "rank"]).head(2)
    assert closed_form_claims.correlation_claim(few).verdict is NOT


def test_rank_correlations_are_spearmans_by_group():
    models = starts_with(["output"] * 4)
    found = rank_correlations(models)
    assert list(found.index) == [(c["model"], c["bits"], c["rank"]) for c in CASES]
    for (_, bits, rank), row in found.iterrows():
        group = models[(models["bits"] == bits) & (models["rank"] == rank)]
        for name in ("weight", "output"):
            expected = spearmanr(group[name], group["error"]).statistic
            assert row[name] == pytest.approx(expected)


def test_only_what_no_paper_states_is_our_own():
    layers = pd.DataFrame(
        case | {"layer": 0, "method": method, "T": t, "seen": 1.0, "output": 1.0}
        for case in CASES
        for method, t in ((QERA, 0), (PLAIN, 0), (DIAGONAL, 0), (LOFTQ, 1), (LOFTQ_QERA, 1))
    )
    assert closed_form_claims.own_base_claim(layers).published
    assert not closed_form_claims.any_base_claim(layers).published
