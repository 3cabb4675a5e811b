"""What a fine-tuning forgets: KL against a plain computation, and the reading of trade-offs."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_llama import some_blocks, tiny_llama

from experiments.errors import ConfigurationError, RunFailed
from experiments.papers.corda_knowledge import claims, trajectories
from experiments.papers.corda_knowledge.reproduction import STARTS
from experiments.papers.corda_knowledge.tradeoff import (
    at_equal_learning,
    reached_by_all,
    reading_at,
)
from experiments.papers.corda_knowledge.trajectories import (
    forgotten,
    hold,
    started_again,
    trajectory,
)
from experiments.papers.verdicts import Verdict
from experiments.schedule import TrainingConfig
from lora_init import LoraConfig, get_peft_model


def logarithms(model, blocks) -> np.ndarray:
    logits = model(input_ids=blocks).logits.detach().double().numpy()
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_what_is_forgotten_is_kl_from_the_original():
    model, other, blocks = tiny_llama(0), tiny_llama(1), some_blocks(5)
    held = hold(model, blocks[:2], blocks, batch_size=2)
    before, after = logarithms(model, blocks), logarithms(other, blocks)
    expected = (np.exp(before) * (before - after)).sum(-1).mean()
    divergence, kept = forgotten(other, held, batch_size=2)
    assert divergence == pytest.approx(expected, rel=1e-4)
    taken = np.take_along_axis(after[:, :-1], blocks[:, 1:, None].numpy(), -1)
    assert kept == pytest.approx(math.exp(-taken.mean()), rel=1e-4)
    assert forgotten(model, held, batch_size=2)[0] == pytest.approx(0, abs=1e-9)


def adapted(start: str):
    model, blocks = tiny_llama(), some_blocks()
    batches = [{"input_ids": blocks, "attention_mask": torch.ones_like(blocks)}]
    held = hold(model, blocks[:3], blocks[3:], batch_size=2)
    config = LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", **STARTS[start])
    return get_peft_model(model, config, calibration=batches, cache=False), blocks, held


@pytest.mark.parametrize("start", STARTS)
def test_every_training_starts_where_the_first_one_did(start):
    model, blocks, held = adapted(start)
    training = TrainingConfig(
        steps=2, batch_size=2, learning_rate=1e-2, schedule="constant", warmup=0.0
    )
    before = logarithms(model, blocks)
    found = []
    for _ in range(2):
        with started_again(model):
            found.append(trajectory(model, blocks, training, held, [1, 2], seed=0, device="cpu"))
        assert np.abs(logarithms(model, blocks) - before).max() < 1e-5
    assert [row["step"] for row in found[0]] == [0, 1, 2]
    assert found[0][-1]["divergence"] > 0
    for first, second in zip(*found, strict=True):
        assert first == pytest.approx(second, rel=1e-3, abs=1e-6)


def test_a_training_that_diverges_shows_what_it_has(monkeypatch):
    model, blocks, held = adapted("kaiming")

    def diverging(model, blocks, settings, *, seed, device, observe):
        observe(1)
        raise RunFailed("the loss is nan", reason="diverged")

    monkeypatch.setattr(trajectories, "fine_tune", diverging)
    training = TrainingConfig(steps=2, batch_size=2)
    rows = trajectory(model, blocks, training, held, [1, 2], seed=0, device="cpu")
    assert [row["step"] for row in rows] == [0, 1]


# -- the trade-off ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("falls", "fall", "expected"),
    [
        ([0.0, 0.2, 0.5], 0.3, 4 / 3),
        ([0.0, 0.1, 0.2], 0.3, None),
        ([0.0, -0.5, -0.1], 0.1, None),
        ([0.0, 0.4, 0.1, 0.4], 0.4, 1.0),  # the first time counts
    ],
)
def test_where_a_fall_is_reached(falls, fall, expected):
    found = reading_at(falls, [0.0, 1.0, 2.0, 3.0][: len(falls)], fall)
    assert found == (None if expected is None else pytest.approx(expected))


def steps(slopes: dict[str, float], falls: dict[str, float]) -> pd.DataFrame:
    """Two rates and two seeds: distance = slope · fall; the higher rate learns twice as much and
    forgets twice as much for it, the second seed forgets a little more."""
    rows = []
    for method, slope in slopes.items():
        for rate in (1.0, 2.0):
            for seed in (0, 1):
                for step in (0, 1, 2):
                    fall = falls[method] * rate / 2 * step / 2
                    distance = slope * rate * (1 + 0.01 * seed) * fall
                    rows.append(
                        {
                            "method": method,
                            "rate": rate,
                            "seed": seed,
                            "step": step,
                            "fall": fall,
                            "divergence": distance**2,
                            "perplexity": 50 * math.exp(distance),
                        }
                    )
    return pd.DataFrame(rows)


def test_all_are_compared_where_the_slowest_has_come():
    made = steps({"kaiming": 1.0, "corda_kpm": 0.5}, {"kaiming": 0.4, "corda_kpm": 1.0})
    assert reached_by_all(made) == pytest.approx(0.4)
    found = at_equal_learning(made, 0.4).set_index(["method", "seed"])
    # LoRA gets there at its higher rate only; kpm at both, and forgets less at the lower one.
    assert found.loc[("kaiming", 0), "rate"] == 2
    assert found.loc[("kaiming", 0), "divergence"] == pytest.approx(0.64)
    assert found.loc[("corda_kpm", 0), "rate"] == 1
    assert found.loc[("corda_kpm", 1), "divergence"] == pytest.approx((0.5 * 1.01 * 0.4) ** 2)
    assert found.loc[("corda_kpm", 1), "perplexity"] == pytest.approx(50 * math.exp(0.202))


EVEN = {"kaiming": 1.0, "corda_kpm": 1.0, "corda_ipm": 1.0}


@pytest.mark.parametrize(
    ("slopes", "falls", "verdicts"),
    [
        (
            EVEN | {"corda_kpm": 0.5},
            EVEN | {"corda_ipm": 1.5, "corda_kpm": 1.2},
            ["reproduced"] * 5,
        ),
        (
            EVEN | {"corda_kpm": 2.0},
            EVEN | {"corda_ipm": 0.5, "corda_kpm": 0.8},
            ["contradicts"] * 5,
        ),
        (
            EVEN | {"corda_kpm": 0.99},
            EVEN,
            ["same direction", "reproduced", "same direction", "not reproduced", "not reproduced"],
        ),
    ],
)
def test_verdicts_follow_the_figures(slopes, falls, verdicts):
    made = steps(slopes, falls)
    fall = reached_by_all(made)
    equal = {share: at_equal_learning(made, share * fall) for share in claims.SHARES}
    found = claims.all_claims(made, equal, fall)
    assert [claim.verdict for claim in found] == verdicts


def test_what_learnt_nothing_is_not_judged():
    made = steps(EVEN, EVEN | {"corda_kpm": -1.0})
    found = claims.all_claims(made, {}, reached_by_all(made))
    assert [claim.verdict for claim in found[:3]] == [Verdict.NOT_JUDGED] * 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+rates.olora=[1e-3]", "allowed are those of kaiming, corda_kpm, corda_ipm, pissa"),
        ("rates.kaiming=[]", r"rates.kaiming=\[\]; allowed are one or more numbers > 0"),
        ("measured_steps=[4,99]", r"measured_steps=\[4, 99\]; allowed are steps from 1 to"),
        ("repeats=0", "repeats=0"),
    ],
)
def test_settings_that_compare_nothing_are_refused(composed_paper, override, message):
    with pytest.raises(ConfigurationError, match=message):
        composed_paper("corda_knowledge", "fast", override)
