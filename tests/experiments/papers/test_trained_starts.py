"""Tests of small claims that need trainings: the search for a rate, arms, and every verdict."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from experiments.papers import osrm_merge
from experiments.papers import sc_lora_retention as retention
from experiments.papers import trained_starts as page
from experiments.papers.claim import Verdict
from experiments.papers.classifier_training import TrainingOptions
from experiments.papers.paired_comparison import compare, differences, search
from experiments.papers.reproduction import Measurement
from experiments.papers.subject import moved

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
    measured = Measurement(TrainingOptions(), {"trainings": found}, {})
    assert compare(one, measured).verdict is verdict


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
    claims = retention.judge_all(Measurement(options, {"trainings": found}, {}))
    assert [claim.verdict for claim in claims] == [verdict] * 3


def test_weights_return_after_they_were_moved():
    weights = {"layer": torch.randn(3, 4)}
    before = weights["layer"].clone()
    with moved(weights, {"layer": torch.ones(3, 4)}, 0.5):
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


class AddedTask:
    """A task of one layer whose loss is the sum of its weights; training adds `gain`."""

    def __init__(self, gain: float | None) -> None:
        self.gain, self.seeds = gain, []
        self.subject = SimpleNamespace(model=torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)))
        self.subject.model[0].weight.data.fill_(1.0)

    @contextmanager
    def trained(self, arm, rate, seed, calibration):
        self.seeds.append((seed, calibration))
        if self.gain is None:
            yield None
            return
        weight = self.subject.model[0].weight
        with moved({"0": weight.data}, {"0": torch.full((1, 2), self.gain)}):
            layer = SimpleNamespace(delta_weight=lambda: torch.full((1, 2), self.gain))
            yield SimpleNamespace(layers={"0": layer}, weight=weight)

    def scores(self, model):
        weight = model.weight if hasattr(model, "weight") else model[0].weight
        return {"loss": weight.sum().item(), "accuracy": 0.5}


def test_a_merge_adds_the_updates_of_both_tasks():
    tasks = [AddedTask(1.0), AddedTask(10.0)]
    found = osrm_merge.merged_losses(tasks, ["other", "one"], osrm_merge.ARMS["osrm"], 1e-3, 5)
    assert found["alone"] == (4 + 22) / 2
    assert found["loss"] == 24
    assert found["disturbance"] == 24 - 13
    assert [task.seeds[0][1] for task in tasks] == ["other", "one"]
    assert tasks[0].seeds[0][0] != tasks[1].seeds[0][0]
    assert all(task.subject.model[0].weight.sum().item() == 2 for task in tasks)
    diverged = [AddedTask(1.0), AddedTask(None)]
    assert (
        osrm_merge.merged_losses(diverged, [None, None], osrm_merge.ARMS["osrm"], 1e-3, 5) is None
    )


def test_sums_are_labeled_by_their_value():
    found = osrm_merge.sums(TrainingOptions(batch_size=4, head_steps=5, steps=2, validation=3))
    assert (len(found.train), len(found.validation)) == (4 * 32, 3)
    for one in found.train:
        value = eval(one.text.removesuffix("="))
        assert one.label == int(value > osrm_merge.THRESHOLD)
