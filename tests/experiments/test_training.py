"""The loop: the same batches for every method, figures as they are, and a clean end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from experiments.config.training import TrainingConfig
from experiments.errors import RunFailed
from experiments.training import loop
from experiments.training.evaluate import evaluate
from experiments.training.loop import (
    gradient_norms,
    learning_rate_factor,
    make_accelerator,
    parameter_groups,
    train,
)


def test_schedule():
    settings = TrainingConfig(steps=100, warmup=0.1, schedule="linear")
    factors = [learning_rate_factor(step, settings) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == max(factors) == 1.0
    assert min(factors) > 0
    assert factors[55] == pytest.approx(0.5)
    cosine = TrainingConfig(steps=100, warmup=0.0, schedule="cosine")
    assert learning_rate_factor(50, cosine) == pytest.approx(0.5)
    constant = TrainingConfig(steps=10, warmup=0.0, schedule="constant")
    assert {learning_rate_factor(step, constant) for step in range(10)} == {1.0}


class Toy(nn.Module):
    """A factor A, a factor B and a head; the loss is a least-squares one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Module()
        self.layer.lora_A = nn.Parameter(torch.ones(2, 3))
        self.layer.lora_B = nn.Parameter(torch.zeros(3, 2))
        self.head = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.seen = []

    def forward(self, input_ids, attention_mask, labels):
        self.seen.append(labels.tolist())
        hidden = input_ids + input_ids @ self.layer.lora_A.T @ self.layer.lora_B.T
        return type("Output", (), {"loss": ((hidden @ self.head - labels) ** 2).mean()})


class ToyTask:
    metric = "accuracy"

    def collate(self, examples):
        x = torch.tensor([[1.0, e % 3, e % 5] for e in examples])
        return {
            "input_ids": x,
            "attention_mask": torch.ones(len(x), 3),
            "labels": torch.tensor([float(e) for e in examples]),
        }

    def rows(self, model, examples, batch_size, device, part=(0, 1)):
        assert not model.training
        assert not torch.is_grad_enabled()
        for e in examples:
            yield {"id": e, "correct": e % 2 == 0, "score": 0.0, "loss": 1.0, "weight": 1}


def run_toy(model, settings, **more):
    rows = []
    summary = train(
        model, ToyTask(), list(range(20)), settings, seed=5,
        accelerator=make_accelerator(settings, "cpu"), record=rows.append, **more,
    )  # fmt: skip
    return rows, summary


def test_the_batches_are_those_of_the_seed():
    settings = TrainingConfig(steps=6, batch_size=4, learning_rate=1e-3)
    first, second = Toy(), Toy()
    second.layer.lora_B.data.fill_(0.3)
    run_toy(first, settings)
    torch.rand(17)
    run_toy(second, settings)
    assert first.seen == second.seen
    assert sorted(label for batch in first.seen[:5] for label in batch) == list(range(20))


def test_the_first_gradient_is_recorded_before_clipping():
    settings = TrainingConfig(steps=2, batch_size=4, learning_rate=1e-3, max_grad_norm=0.1)
    model, reference = Toy(), Toy()
    rows, summary = run_toy(model, settings)
    batch = ToyTask().collate([int(label) for label in model.seen[0]])
    reference(**batch).loss.backward()
    norms = summary.gradient_norms
    assert norms["A"] == reference.layer.lora_A.grad.norm() == 0  # B is zero
    assert norms["B"] == pytest.approx(float(reference.layer.lora_B.grad.norm()), rel=1e-5)
    assert norms["head"] == pytest.approx(float(reference.head.grad.norm()), rel=1e-5)
    assert norms["total"] == pytest.approx(math.hypot(norms["B"], norms["head"]))
    assert rows[0]["grad_norm"] == pytest.approx(norms["total"], rel=1e-5)


def test_what_is_recorded():
    settings = TrainingConfig(steps=5, batch_size=4, learning_rate=2e-3, warmup=0.2)
    seen = []
    rows, summary = run_toy(Toy(), settings, advance=lambda step, loss: seen.append(step))
    assert [row["step"] for row in rows] == seen == [1, 2, 3, 4, 5]
    keys = {"step", "split", "loss", "lr", "grad_norm", "tokens_per_second"}
    assert all(set(row) == keys and row["split"] == "train" for row in rows)
    assert rows[0]["lr"] == pytest.approx(1e-3)
    assert max(row["lr"] for row in rows) == pytest.approx(2e-3)
    assert summary.tokens == 5 * 4 * 3
    assert summary.seconds > 0


def test_tokens_are_those_of_all_processes(monkeypatch):
    """A batch is split unevenly: one process's share times their number would only be near it."""
    settings = TrainingConfig(steps=2, batch_size=4, learning_rate=1e-3)
    accelerator = make_accelerator(settings, "cpu")
    other = {"sum": 5, "mean": 0}  # what the others of this make-believe group add
    monkeypatch.setattr(accelerator, "reduce", lambda value, how: value + other[how])
    summary = train(
        Toy(), ToyTask(), list(range(20)), settings, seed=5, accelerator=accelerator,
        record=lambda row: None,
    )  # fmt: skip
    assert summary.tokens == 2 * (4 * 3 + 5)


def test_a_head_may_have_its_own_rate():
    slow = TrainingConfig(
        steps=1, batch_size=4, learning_rate=1e-4, head_learning_rate=1e-1, warmup=0.0
    )
    model = Toy()
    run_toy(model, slow)
    # AdamW's first step is the learning rate in every coordinate.
    assert float((model.head - 1).detach().abs().max()) == pytest.approx(1e-1, rel=1e-2)
    assert float(model.layer.lora_B.detach().abs().max()) == pytest.approx(1e-4, rel=1e-2)
    assert torch.equal(model.frozen, torch.ones(3))


def test_b_may_learn_faster_than_a():
    settings = TrainingConfig(
        steps=1, batch_size=4, learning_rate=1e-3, lora_plus_ratio=8.0, warmup=0.0
    )
    model = Toy()
    model.layer.lora_B.data.fill_(0.3)
    rows, _ = run_toy(model, settings)
    # AdamW's first step is the learning rate in every coordinate.
    assert float((model.layer.lora_A - 1).detach().abs().max()) == pytest.approx(1e-3, rel=1e-2)
    moved = float((model.layer.lora_B - 0.3).detach().abs().max())
    assert moved == pytest.approx(8e-3, rel=1e-2)
    assert float((model.head - 1).detach().abs().max()) == pytest.approx(1e-3, rel=1e-2)
    assert rows[0]["lr"] == pytest.approx(1e-3)


class Clock:
    """A second passes at each look at it."""

    now = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


def test_observation_comes_after_every_step_and_takes_no_time(monkeypatch):
    settings = TrainingConfig(steps=3, batch_size=4, learning_rate=1e-3)
    seen, clock = [], Clock()
    monkeypatch.setattr(loop, "time", clock)

    def observe(step):
        seen.append(step)
        clock.now += 1e6

    _, summary = run_toy(Toy(), settings, observe=observe)
    assert seen == [1, 2, 3]
    assert 0 < summary.seconds < 1e6


def test_validation_comes_when_it_is_due():
    settings = TrainingConfig(steps=7, batch_size=4, validate_every=3, learning_rate=1e-3)
    due = []
    run_toy(Toy(), settings, validate=due.append)
    assert due == [3, 6, 7]


def test_parameter_groups_leave_frozen_ones_out():
    model = Toy()
    groups = parameter_groups(model)
    assert [len(group) for group in groups.values()] == [1, 1, 1]
    assert gradient_norms(groups) == {"total": 0.0, "A": 0.0, "B": 0.0, "head": 0.0}


def test_evaluation_leaves_the_mode_as_it_was():
    settings = TrainingConfig()
    model = Toy().train()
    result = evaluate(
        model, ToyTask(), list(range(10)), settings, make_accelerator(settings, "cpu")
    )
    assert result.metrics == {"loss": 1.0, "accuracy": 0.5}
    assert model.training


def test_accelerators_of_one_process_do_not_share_their_state():
    assert make_accelerator(TrainingConfig(mixed_precision="bf16"), "cpu").mixed_precision == "bf16"
    assert make_accelerator(TrainingConfig(), "cpu").mixed_precision == "no"


class Diverging(Toy):
    """Turns one figure of one step into another."""

    def __init__(self, figure: str, step: int, value: float):
        super().__init__()
        self.figure, self.step, self.value = figure, step, value

    def forward(self, **batch):
        output = super().forward(**batch)
        if len(self.seen) == self.step:
            if self.figure == "loss":
                output.loss = output.loss * self.value
            elif self.figure == "gradient":
                self.head.register_hook(lambda gradient: gradient * self.value)
        return output


@pytest.mark.parametrize("clipped", [1.0, None])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("figure", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_in_any_step(figure, step, value, clipped):
    settings = TrainingConfig(steps=3, batch_size=4, max_grad_norm=clipped)
    model = Diverging(figure, step, value)
    before = []
    with pytest.raises(RunFailed, match=r"training diverged; lower") as error:
        run_toy(model, settings, advance=lambda done, loss: before.append(done))
    assert (error.value.reason, error.value.facts["step"]) == ("diverged", step)
    assert before == list(range(1, step))
    assert torch.isfinite(model.head).all(), "the step is not done"


@pytest.mark.parametrize("steps", [1, 2])
def test_weights_that_the_last_step_ruins_end_the_run(steps):
    """No further loss would tell."""
    settings = TrainingConfig(
        steps=steps, batch_size=4, learning_rate=1e30, warmup=0.0, schedule="constant"
    )
    message = r"training diverged; lower training\.learning_rate=1e\+30"
    with pytest.raises(RunFailed, match=message) as error:
        run_toy(Toy(), settings)
    assert error.value.reason == "diverged"
