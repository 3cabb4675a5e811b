"""Budgets: steps from tokens, and adapters of equal size or a refusal that says what would fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from experiments.config.training import BudgetConfig, TrainingConfig
from experiments.errors import ConfigurationError
from experiments.run.budget import check_parameters, limit_steps
from experiments.run.execute import execute
from experiments.run.folder import identify
from experiments.tasks import SeededBatches
from lora_init import LoraConfig, get_peft_model
from lora_init.initializers.gora import GoraOptions
from lora_init.registry import get_initializer


class Counting:
    """Examples are their own numbers of tokens."""

    def collate(self, examples):
        longest = max(examples)
        rows = [[1] * n + [0] * (longest - n) for n in examples]
        return {"attention_mask": torch.tensor(rows)}


EXAMPLES = [3, 7, 1, 9, 4, 6, 2, 8]


@pytest.mark.parametrize("tokens", [1, 20, 37, 38, 400])
def test_the_fewest_steps_that_see_the_tokens(tokens):
    settings = TrainingConfig(steps=50, batch_size=3)
    limited = limit_steps(settings, BudgetConfig(tokens=tokens), Counting(), EXAMPLES, seed=4)
    seen = [
        sum(EXAMPLES[index] for index in batch)
        for batch in SeededBatches(len(EXAMPLES), 3, 50, seed=4)
    ]
    assert sum(seen[: limited.steps]) >= tokens > sum(seen[: limited.steps - 1])
    assert limited.batch_size == 3
    assert limit_steps(settings, BudgetConfig(), Counting(), EXAMPLES, seed=4) is settings


def test_a_token_budget_out_of_reach_is_refused():
    settings = TrainingConfig(steps=8, batch_size=1)  # one epoch: 40 tokens
    with pytest.raises(ConfigurationError, match=r"steps=8 steps see 40 tokens.*about 16"):
        limit_steps(settings, BudgetConfig(tokens=80), Counting(), EXAMPLES, seed=0)


def test_a_run_stops_at_its_tokens(configured, tiny):
    settings = [*tiny, "training.steps=40"]
    run = configured(*settings, "budget.tokens=100")
    result = execute(run)
    assert result["budget"]["steps"] == result["steps"] < 40
    assert 100 <= result["budget"]["tokens"] == result["train_tokens"] < 200
    other = configured(*settings, "budget.tokens=101")
    assert identify(other).id != identify(run).id


def plan_for(r=4, method="pissa", **settings):
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
    config = LoraConfig(r=r, target_modules=["0", "1"], init_lora_weights=method, **settings)
    return get_peft_model(model, config, dry_run=True)


def check(plan, wanted, r=4):
    check_parameters(plan, BudgetConfig(trainable_parameters=wanted), rank=r, allocated=False)


def test_equal_parameters():
    """One rank of the two layers is 50 + 40 parameters."""
    for wanted in (360, 360 - 49, 360 + 49):
        check(plan_for(4), wanted)
    for wanted in (360 - 50, 360 + 50):
        with pytest.raises(ConfigurationError, match=r"init=pissa have 360 at lora.r=4"):
            check(plan_for(4), wanted)
    check_parameters(plan_for(4), BudgetConfig(), rank=4, allocated=False)


def test_a_refusal_names_the_rank_that_would_do():
    with pytest.raises(ConfigurationError, match=r"set lora\.r=8$"):
        check(plan_for(4), 720)
    with pytest.raises(ConfigurationError, match=r"set lora\.r=8$"):
        check(plan_for(4, use_dora=True), 720 + 40)  # the magnitudes: one a row
    with pytest.raises(ConfigurationError, match="change lora.r or lora.rank_pattern"):
        check(plan_for(4, rank_pattern={"1": 2}), 720)
    wide = nn.Sequential(*(nn.Linear(20, 20) for _ in range(4)))
    names = [str(index) for index in range(4)]
    config = LoraConfig(r=1, target_modules=names, init_lora_weights="pissa")
    plan = get_peft_model(wide, config, dry_run=True)
    offer = r"no rank fits: set lora\.r=2 with budget\.trainable_parameters=320 or lora\.r=3"
    with pytest.raises(ConfigurationError, match=offer):
        check(plan, 400, r=1)


def test_an_allocation_is_held_to_the_budget(configured, tiny):
    """At equal sums of ranks EVA's adapters have another size, and the run is refused."""
    settings = [*tiny, "lora.r=8", "init=eva", "budget.trainable_parameters=7680"]
    with pytest.raises(ConfigurationError, match=r"the method chose.*init\.budget=parameters"):
        execute(configured(*settings))
    result = execute(configured(*settings, "init.budget=parameters"))
    assert 7680 - 96 < result["budget"]["trainable_parameters"] <= 7680
    uniform = execute(configured(*settings, "init=pissa"))
    assert uniform["budget"]["trainable_parameters"] == 7680


def test_a_method_without_a_budget_of_its_own_is_told_what_it_has():
    plan = replace(plan_for(4), initializer=get_initializer("gora"), options=GoraOptions())
    with pytest.raises(ConfigurationError, match=r"the method chose.*every layer keeps lora\.r"):
        check_parameters(plan, BudgetConfig(trainable_parameters=720), rank=4, allocated=True)


@pytest.mark.parametrize("override", ["budget.tokens=0", "budget.trainable_parameters=-1"])
def test_bad_budgets_are_named(configured, override):
    with pytest.raises(ConfigurationError, match=rf"{override} .*integer >= 1, or null"):
        configured(override)
