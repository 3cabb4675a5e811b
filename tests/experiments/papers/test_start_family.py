"""Tests of the family tree of starts: overlaps, equal pairs, and every verdict."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from experiments.papers import start_family as page
from experiments.papers.claim import Verdict
from experiments.papers.start_family_rows import (
    basis,
    captured,
    output_errors,
    overlap,
    pairs,
    positive,
    written_out,
)
from lora_init import Factors, init_factors
from lora_init.linalg.moments import InputStatistics


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_overlap_is_the_mean_squared_cosine_of_principal_angles():
    one, two = basis(drawn(9, 3)), basis(drawn(9, 3, seed=1))
    cosines = torch.linalg.svdvals(one.mT @ two)
    assert overlap(one, two) == pytest.approx(float(cosines.square().mean()))
    assert overlap(one, basis(drawn(9, 3) @ drawn(3, 3, seed=2))) == pytest.approx(1)
    assert basis(torch.zeros(9, 3)) is None


def test_pairs_compare_spaces_and_products():
    lora_A, lora_B = drawn(2, 5), drawn(4, 2, seed=1)
    starts = {
        "plain": Factors(lora_A, lora_B),
        "scaled": Factors(lora_A, 3 * lora_B),
        "zero": Factors(lora_A, torch.zeros(4, 2)),
    }
    rows = {(row["one"], row["two"]): row for row in pairs(starts)}
    row = rows["plain", "scaled"]
    assert (row["A"], row["B"], row["cosine"]) == pytest.approx((1, 1, 1))
    assert row["ratio"] == pytest.approx(3)
    assert rows["plain", "zero"]["B"] is None
    assert "cosine" not in rows["plain", "zero"]


def test_starts_are_grouped_by_their_closest_relation():
    lora_A, lora_B = drawn(2, 5), drawn(4, 2, seed=1)
    zero, turned = torch.zeros(4, 2), drawn(2, 2, seed=4)
    starts = {
        "plain": Factors(lora_A, lora_B),
        "turned": Factors(turned @ lora_A, lora_B @ turned.inverse()),
        "scaled": Factors(lora_A, 3 * lora_B),
        "kept": Factors(lora_A, zero),
        "kept half": Factors(lora_A / 2, zero),
        "other": Factors(drawn(2, 5, seed=2), drawn(4, 2, seed=3)),
    }
    found = page.relations(pd.DataFrame(pairs(starts)))
    assert found.values.tolist() == [
        [page.RELATIONS["same"], "plain = turned"],
        [page.RELATIONS["scaled"], "kept · kept half"],
        [page.RELATIONS["scaled"], "plain · scaled · turned"],
        [page.RELATIONS["A"], "kept · kept half · plain · scaled · turned"],
    ]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_equal_starts_are_equal_on_a_random_layer(shape):
    """The identities on which the page's first claim rests."""
    weight, inputs = drawn(*shape), InputStatistics.of_rows(drawn(200, shape[1], seed=1).double())
    gradient = drawn(*shape, seed=3)
    keep = InputStatistics.of_rows(drawn(200, shape[1], seed=2).double())
    settings = {"r": 3, "name": "layer"}
    starts = {
        "astra": init_factors(weight, "astra", inputs=inputs, **settings),
        "sc_lora, beta 0": init_factors(
            weight, {"name": "sc_lora", "beta": 0.0}, inputs={"learn": inputs, "keep": keep},
            **settings,
        ),
        "eva": init_factors(weight, {"name": "eva", "rho": 1.0}, inputs=inputs, **settings),
        "eva_frozen": init_factors(
            weight, {"name": "eva_frozen", "rho": 1.0}, inputs=inputs, **settings
        ),
        "qera": init_factors(weight, "qera", inputs=inputs, **settings),
        "srr, none preserved": init_factors(
            weight, {"name": "srr", "preserved": 0}, inputs=inputs, **settings
        ),
        "pissa": init_factors(weight, "pissa", **settings),
        "geora, all": init_factors(weight, {"name": "geora", "fraction": 1.0}, **settings),
        "lora_ga, LOI": init_factors(
            weight, {"name": "lora_ga", "direction": "A2rBr", "scale": "unit"}, gradient=gradient,
            **settings,
        ),
    } | written_out(weight, {"inputs": inputs, "gradient": gradient}, 3)  # fmt: skip
    found = pd.DataFrame(pairs(starts))
    for one, two in page.EQUAL:
        assert float(page.distances(found, one, two).max()) < page.SAME
    assert float(page.distances(found, "astra", "pissa").max()) > 0.01
    assert page.equal_claim(found).verdict is Verdict.REPRODUCED


def test_the_refit_has_the_least_output_error():
    weight = drawn(64, 64)
    inputs = InputStatistics.of_rows((drawn(500, 64, seed=1) * torch.linspace(0.1, 3, 64)).double())

    class Settings:
        rank, seed = 4, 0

    errors = pd.DataFrame(output_errors(weight, inputs, Settings))
    for _, some in errors.groupby("bits"):
        error = some.set_index("method")["error"]
        assert error["srr, refitted"] <= error["srr"] * (1 + 1e-6)
    qera = errors[errors["method"] == "qera"].set_index("bits")["error"]
    assert qera[2] > qera[3] > qera[4]


def test_the_first_step_by_triplets_is_that_of_the_factors():
    """PEFT's factors are A = V_{1:r}ᵀ and B = k U_{r+1:2r} S_{r+1:2r}."""
    gradient, rank = drawn(12, 20).double(), 3

    class Settings:
        seed = 0

    Settings.rank = rank
    found = captured(gradient, Settings)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    lora_A, lora_B = right[:rank], left[:, rank : 2 * rank]
    for name, scaled in (
        ("cosine", lora_B),
        ("cosine, B times S", lora_B * values[rank : 2 * rank] * 12**0.25 / 4),
    ):
        step = gradient @ lora_A.mT @ lora_A + scaled @ scaled.mT @ gradient
        cosine = (step * gradient).sum() / step.norm() / gradient.norm()
        assert found[name] == pytest.approx(float(cosine))
    assert found["the same set"] == pytest.approx(0.5, abs=0.02)
    assert found["low"] < 0.4 < 0.6 < found["high"]


@pytest.mark.parametrize(
    ("peft", "verdict"),
    [
        ([0.7, 0.71, 0.72], Verdict.REPRODUCED),
        ([0.894, 0.895, 0.896], Verdict.SAME_DIRECTION),
        ([0.8, 0.9, 0.95], Verdict.NOT_REPRODUCED),
        ([0.95, 0.96, 0.97], Verdict.CONTRADICTS),
    ],
)
def test_the_claim_on_peft_scale(peft, verdict):
    rows = pd.DataFrame({"cosine": [0.9] * 3, "cosine, B times S": peft})
    assert page.scale_claim(rows).verdict is verdict


def test_positive_eigenvalues_fall_with_beta():
    given = {
        name: InputStatistics.of_rows(drawn(300, 10, seed=seed).double())
        for seed, name in enumerate(("inputs", "keep"))
    }
    rows = positive(drawn(8, 10), given, 4)
    counts = [row["positive"] for row in rows]
    assert counts == sorted(counts, reverse=True)
    assert all(row["enough"] == (row["positive"] >= 4) for row in rows)


@pytest.mark.parametrize(
    ("share", "verdict"),
    [
        (0.6, Verdict.REPRODUCED),
        (0.3, Verdict.SAME_DIRECTION),
        (0.2, Verdict.NOT_REPRODUCED),
        (0.05, Verdict.CONTRADICTS),
    ],
)
def test_the_claim_on_signs(share, verdict):
    rows = pd.DataFrame({"sign G": [share] * 3, "G": [0.9] * 3})
    assert page.sign_claim(rows).verdict is verdict


@pytest.mark.parametrize(
    ("srr", "verdict"),
    [
        ([0.9, 0.91, 0.92], Verdict.REPRODUCED),
        ([0.994, 0.995, 0.996], Verdict.SAME_DIRECTION),
        ([0.9, 1.0, 1.1], Verdict.NOT_REPRODUCED),
        ([1.09, 1.1, 1.11], Verdict.CONTRADICTS),
    ],
)
def test_the_claim_on_preserved_directions(srr, verdict):
    rows = pd.DataFrame(
        {"model": "m", "layer": str(i), "bits": 4, "method": method, "error": error}
        for i, value in enumerate(srr)
        for method, error in (("qera", 1.0), ("srr", value), ("srr, refitted", 0.9))
    )
    assert page.refit_claim(rows).verdict is verdict


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.3, 0.2, 0.1], Verdict.REPRODUCED),
        ([0.2, 0.3, 0.1], Verdict.SAME_DIRECTION),
        ([0.1, 0.2, 0.3], Verdict.CONTRADICTS),
    ],
)
def test_the_claim_on_unused_directions(gains, verdict):
    rows = pd.DataFrame({"width": [384, 576, 1536], "random": gains, "least used": [0.0] * 3})
    assert page.unused_claim(rows).verdict is verdict


@pytest.mark.exhaustive
def test_the_smoke_form_is_drawn(smoke):
    found = smoke("start_family")
    assert len(found.claims) == 7
    assert {figure.name for figure in found.figures} == {"overlap_minilm"}
