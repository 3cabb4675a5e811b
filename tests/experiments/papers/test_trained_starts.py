"""Tests of small claims that need trainings: the search for a rate, arms, and every verdict."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from experiments.papers import sc_lora_retention as retention
from experiments.papers import trained_starts as page
from experiments.papers.claim import Verdict
from experiments.papers.classifier_training import TrainingOptions, differences, search

RATES = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]


@pytest.mark.parametrize("best", RATES)
def test_the_search_finds_a_rate_with_tried_neighbors(best):
    tried = []

    def loss(rate: float) -> float:
        tried.append(rate)
        return abs(math.log10(rate / best))

    assert search(loss, RATES) == best
    place = RATES.index(best)
    assert set(RATES[max(0, place - 1) : place + 2]) <= set(tried)
    assert len(tried) == len(set(tried))


def rows(gaps: dict[str, list[float]], **more: list[float]) -> pd.DataFrame:
    """Compared rows of several arms, and one of the search that must not count."""
    compared = [
        {"arm": arm, "rate": 1e-3, "seed": seed, "compared": True, "loss": loss, "accuracy": 0.5}
        | {name: values[seed] * (1 if arm == "kaiming" else loss) for name, values in more.items()}
        for arm, losses in gaps.items()
        for seed, loss in enumerate(losses)
    ]
    searched = [{**row, "compared": False, "loss": 9.0, "seed": 99} for row in compared[:1]]
    return pd.DataFrame(compared + searched)


def test_differences_are_paired_by_seed():
    found = differences(rows({"a": [0.1, 0.2, 0.3], "b": [0.2, 0.3, 0.4]}), "a", "b")
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.1, 0.11, 0.12], Verdict.REPRODUCED),
        ([-0.1, -0.11, -0.12], Verdict.CONTRADICTS),
        ([-0.1, 0.0, 0.11], Verdict.NOT_RESOLVED),
    ],
)
def test_the_interval_of_the_differences_decides(gains, verdict):
    one = page.COMPARISONS[0]
    found = rows({one.arm: [0.5 - gain for gain in gains], one.other: [0.5] * 3})
    measured = page.Measurement(TrainingOptions(), {"trainings": found}, {})
    assert page.compare(one, measured).verdict is verdict


def test_controls_have_the_sizes_that_their_names_say():
    generator = torch.Generator().manual_seed(0)
    lora_A, lora_B = torch.randn(4, 30, generator=generator), torch.randn(20, 4)
    page.orthonormal_size(lora_A, lora_B, generator)
    assert float(lora_A.norm()) == pytest.approx(2)
    page.noise_size(lora_A, lora_B, generator)
    assert float(lora_A.std(correction=0)) == pytest.approx(math.sqrt(2 / 34))
    before = lora_A.clone()
    page.permuted_inputs(lora_A, lora_B, generator)
    assert not lora_A.equal(before)
    assert lora_A.sort(1).values.equal(before.sort(1).values)
    page.orthonormal_columns(lora_A, lora_B, generator)
    torch.testing.assert_close(lora_B.mT @ lora_B, torch.eye(4))


def test_every_comparison_has_its_arms():
    arms = page.arms_of(8, 27)
    for one in page.COMPARISONS:
        assert {one.arm, one.other} <= set(arms)


@pytest.mark.parametrize(
    ("least", "verdict"),
    [(0.5, Verdict.REPRODUCED), (1.0, Verdict.NOT_RESOLVED), (2.0, Verdict.CONTRADICTS)],
)
def test_retention_is_judged_by_the_change_of_what_is_kept(least, verdict):
    values = [1.0, 1.01, 1.02]
    found = rows(
        {"kaiming": [1.0] * 3, "sc_lora, beta 0": [1.0] * 3, "sc_lora, beta 0.9": [least] * 3},
        change=values,
        matched=values,
        size=values,
    )
    options = retention.RetentionOptions(betas=[0.0, 0.9])
    claims = retention.judge_all(retention.Measurement(options, {"trainings": found}, {}))
    assert [claim.verdict for claim in claims] == [verdict] * 3


def test_weights_return_after_they_were_moved():
    weights = {"layer": torch.randn(3, 4)}
    before = weights["layer"].clone()
    with retention.moved(weights, {"layer": torch.ones(3, 4)}, 0.5):
        torch.testing.assert_close(weights["layer"], before + 0.5)
    assert weights["layer"].equal(before)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rates": [1e-2, 1e-3]}, "rates=.* must be ascending numbers > 0"),
        ({"repeats": 1}, "repeats=1 is not supported: must be an integer >= 2"),
        ({"betas": [0.5]}, "betas=.* must be two or more ascending numbers from 0 to 1"),
    ],
)
def test_options_are_refused_by_name(setting, message):
    with pytest.raises(ValueError, match=message):
        retention.RetentionOptions(**setting)
