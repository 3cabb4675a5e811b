"""What a fine-tuning forgets: KL against a plain computation, and the reading of trade-offs."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_llama import some_blocks, tiny_llama

from experiments.config.training import TrainingConfig
from experiments.errors import ConfigurationError, RunFailed
from experiments.papers import corda_knowledge_claims as claims
from experiments.papers import corda_knowledge_rows as trajectories
from experiments.papers.claim import Verdict
from experiments.papers.corda_knowledge_rows import (
    STARTS,
    adapted,
    forgotten,
    hold,
    started_again,
    trajectory,
)
from experiments.papers.corda_knowledge_tradeoff import (
    at_equal_learning,
    at_shares,
    reached_by_all,
    reading_at,
    winning_rates,
)
from lora_init import LoraConfig, get_peft_model


def logarithms(model, blocks) -> np.ndarray:
    logits = model(input_ids=blocks).logits.detach().double().numpy()
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_what_is_forgotten_is_kl_from_the_original():
    model, other, blocks = tiny_llama(0), tiny_llama(1), some_blocks(5)
    held = hold(model, blocks[:2], blocks, batch_size=2)
    before, after = logarithms(model, blocks), logarithms(other, blocks)
    expected = (np.exp(before) * (before - after)).sum(-1).mean(-1)
    divergences, losses = forgotten(other, held, batch_size=2)
    assert divergences == pytest.approx(expected, rel=1e-4)
    taken = np.take_along_axis(after[:, :-1], blocks[:, 1:, None].numpy(), -1)
    assert losses == pytest.approx(-taken.mean((1, 2)), rel=1e-5)
    divergences, losses = forgotten(model, held, batch_size=2)
    assert np.abs(divergences).max() < 1e-7
    assert losses == pytest.approx(held.losses)


def test_a_small_divergence_of_large_logits_is_not_lost_in_rounding():
    generator = torch.Generator().manual_seed(0)
    logits = 20 + 3 * torch.randn(2, 3, 5000, generator=generator)
    moved = logits + 0.03 * torch.randn(2, 3, 5000, generator=generator)
    before, after = (x.double().log_softmax(-1) for x in (logits, moved))
    expected = (before.exp() * (before - after)).sum(-1)
    found = trajectories.divergence_of(logits.log_softmax(-1), moved)
    assert found.double() == pytest.approx(expected, abs=1e-5)
    assert expected.max() < 1e-3


def started(start: str):
    model, blocks = tiny_llama(), some_blocks()
    batches = [{"input_ids": blocks, "attention_mask": torch.ones_like(blocks)}]
    held = hold(model, blocks[:3], blocks[3:], batch_size=2)
    config = LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", **STARTS[start])
    return get_peft_model(model, config, calibration=batches, cache=False), blocks, held


@pytest.mark.parametrize("start", STARTS)
def test_every_training_starts_where_the_first_one_did(start):
    model, blocks, held = started(start)
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
        for name in first:
            assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-6)


def test_a_start_that_was_taken_off_comes_back_as_it_was(monkeypatch):
    made, blocks, _ = started("pissa")
    calls = []
    monkeypatch.setattr("experiments.papers.corda_knowledge_rows.calibrated", lambda *args: None)
    monkeypatch.setattr(
        "experiments.papers.corda_knowledge_rows.injected",
        lambda *args: calls.append(args) or made,
    )
    original = logarithms(tiny_llama(), blocks)
    parked, found = {}, []
    for _ in range(2):
        with adapted(None, "pissa", 0, None, parked) as model:
            found.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
            assert np.abs(logarithms(model, blocks) - original).max() < 1e-4
        assert set(parked) == {"pissa"}
        assert np.abs(logarithms(made.base_model, blocks) - original).max() < 1e-4
    assert len(calls) == 1
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_a_training_that_diverges_shows_what_it_has(monkeypatch):
    model, blocks, held = started("kaiming")

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
    values = [np.array([x, 2 * x]) for x in (0.0, 1.0, 2.0, 3.0)][: len(falls)]
    found = reading_at(falls, values, fall)
    assert found is None if expected is None else found == pytest.approx([expected, 2 * expected])


LEARNT = {0.5: 0.1, 1.0: 0.6, 2.0: 1.0, 4.0: 0.2}


def steps(
    slopes: dict[str, float],
    falls: dict[str, float],
    learned: dict[float, float] = LEARNT,
    noise: float = 0.0,
) -> pd.DataFrame:
    """By rate, what is learned of a method's fall, and two seeds: distance = slope · rate · fall,
    the second seed forgets a little more.

    Args:
        noise: of each block's loss, for each method of its own.
    """
    rows = []
    for number, (method, slope) in enumerate(slopes.items()):
        drawn = np.random.default_rng(number).normal(size=4)
        for rate, share in learned.items():
            for seed in (0, 1):
                for step in (0, 1, 2):
                    fall = falls[method] * share * step / 2
                    distance = slope * rate * (1 + 0.01 * seed) * fall
                    divergences = np.full(4, distance**2)
                    losses = math.log(50) + distance + noise * (drawn - drawn.mean())
                    rows.append(
                        {
                            "method": method,
                            "rate": rate,
                            "seed": seed,
                            **trajectories.point(step, fall, divergences, losses),
                        }
                    )
    return pd.DataFrame(rows)


def judged(made: pd.DataFrame) -> list:
    return claims.all_claims(made, at_shares(made), reached_by_all(made))


def test_all_are_compared_where_the_slowest_has_come():
    made = steps({"kaiming": 1.0, "corda_kpm": 0.5}, {"kaiming": 0.4, "corda_kpm": 1.0})
    assert reached_by_all(made) == pytest.approx(0.4)
    found = at_equal_learning(made, 0.4).set_index(["method", "seed"])
    # LoRA gets there at one rate only; kpm at two, and forgets less at the lower one.
    assert found.loc[("kaiming", 0), "rate"] == 2
    assert found.loc[("kaiming", 0), "divergence"] == pytest.approx(0.64)
    assert found.loc[("corda_kpm", 0), "rate"] == 1
    assert found.loc[("corda_kpm", 1), "divergence"] == pytest.approx((0.5 * 1.01 * 0.4) ** 2)
    assert found.loc[("corda_kpm", 1), "perplexity"] == pytest.approx(50 * math.exp(0.202))


def test_other_seeds_repeat_the_rates_that_are_best_somewhere():
    made = steps({"kaiming": 1.0, "corda_kpm": 0.5}, {"kaiming": 0.4, "corda_kpm": 1.0})
    # LoRA: 1 for half of the fall, 2 for all of it and at the end; kpm: 1 for both, 2 at the end.
    assert winning_rates(made) == {"kaiming": [1.0, 2.0], "corda_kpm": [1.0, 2.0]}
    alone = made[(made["method"] == "corda_kpm") | (made["step"] == 0)]
    assert winning_rates(alone)["kaiming"] == sorted(LEARNT)  # it diverged: nothing has won


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
            EVEN | {"corda_kpm": 0.99},
            ["same direction", "reproduced", "same direction", "not reproduced", "reproduced"],
        ),
        (
            EVEN | {"corda_kpm": 1.02},
            EVEN | {"corda_ipm": 1.01, "corda_kpm": 0.97},
            ["not reproduced", "contradicts", "not reproduced", "reproduced", "contradicts"],
        ),
    ],
)
def test_verdicts_follow_the_figures(slopes, falls, verdicts):
    found = judged(steps(slopes, falls))
    assert [claim.verdict for claim in found] == verdicts
    assert [claim.published for claim in found] == [True, True, False, True, True]
    for claim in found:
        assert "contradicts: " in claim.criterion
        assert not claim.remark


@pytest.mark.parametrize("slope", [0.97, 1.03])
def test_a_difference_within_its_interval_over_the_text_decides_nothing(slope):
    made = steps(EVEN | {"corda_kpm": slope}, EVEN, noise=1.0)
    expected = Verdict.SAME_DIRECTION if slope < 1 else Verdict.NOT_REPRODUCED
    found = judged(made)[1]
    assert found.verdict is expected
    assert "[" in found.ours


def test_one_seed_that_stays_behind_is_a_direction_only():
    made = steps(EVEN, EVEN | {"corda_ipm": 1.5})
    behind = (made["method"] == "corda_ipm") & (made["seed"] == 1)
    made.loc[behind, "fall"] *= 0.6
    assert judged(made)[3].verdict is Verdict.SAME_DIRECTION


def test_a_best_rate_at_an_edge_is_told_and_two_are_not_judged():
    rising = {0.5: 0.1, 1.0: 0.6, 2.0: 1.0}
    made = steps(EVEN | {"corda_kpm": 0.5}, EVEN | {"corda_ipm": 1.5, "corda_kpm": 1.2}, rising)
    found = judged(made)
    assert [claim.verdict for claim in found] == [Verdict.NOT_JUDGED] * 5
    assert "CorDA ipm is best at the highest of its rates" in found[3].remark
    one = pd.concat([made, steps(EVEN, EVEN).query("method == 'kaiming' and rate == 4.0")])
    found = judged(one)
    assert found[0].verdict is Verdict.REPRODUCED
    assert found[0].remark.startswith("CorDA kpm is best at the highest of its rates at 1.00 nats")
    assert "LoRA" not in found[0].remark
    assert found[4].verdict is Verdict.REPRODUCED


def test_what_learnt_nothing_is_not_judged():
    made = steps(EVEN, EVEN | {"corda_kpm": -1.0})
    found = judged(made)
    assert [claim.verdict for claim in found[:3]] == [Verdict.NOT_JUDGED] * 3


def test_a_start_that_came_to_no_end_is_not_judged():
    made = steps(EVEN, EVEN)
    made = made[(made["method"] != "corda_ipm") | (made["step"] == 0)]
    assert judged(made)[3].verdict is Verdict.NOT_JUDGED


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+rates.olora=[1e-3]", "must be rates of some of kaiming, corda_kpm, corda_ipm, pissa"),
        ("rates.kaiming=[]", r"rates=.*kaiming.: \[\].* must be one or more numbers > 0"),
        (
            "measured_steps=[4,99]",
            r"measured_steps=\[4, 99\] is not supported: must be steps from 1 to",
        ),
        ("repeats=0", "repeats=0"),
    ],
)
def test_settings_that_compare_nothing_are_refused(composed_paper, override, message):
    with pytest.raises(ConfigurationError, match=message):
        composed_paper("corda_knowledge", "fast", override)
