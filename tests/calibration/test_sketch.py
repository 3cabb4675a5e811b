"""Sketches of gradients against the whole gradient in float64, and against their stated error."""

import math

import peft
import pytest
import torch
from measures import relative_gap
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_init import (
    Calibration,
    LoraConfig,
    WithLoss,
    calibrate,
    get_peft_model,
    initialize_peft_model,
)
from lora_init.calibration.gradients import collect_gradients
from lora_init.calibration.sketch import sketch_gradients
from lora_init.registry import OVERSAMPLING, POWERS

RANK = 4


class Wide(nn.Module):
    """A Linear, a Conv1D and a convolution whose gradients have decaying spectra."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(160, 120), Conv1D(200, 120)
        self.picture = nn.Conv2d(8, 90, 3)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape) / 10)

    def forward(self, x):
        hidden = self.second(torch.tanh(self.first(x)))
        return self.picture(torch.tanh(hidden).view(-1, 8, 5, 5))


def loss(model, x):
    return model(x).square().mean()


def batches(count=3, rows=40):
    torch.manual_seed(1)
    scales = torch.arange(1, 161) ** -0.7
    return [torch.randn(rows, 160) * scales for _ in range(count)]


def exact(count=3):
    model = Wide().double()
    names = ["first", "second", "picture"]
    wide = [batch.double() for batch in batches(count)]
    return collect_gradients(model, names, wide, loss=loss)


@pytest.mark.parametrize("tiny", [1.0, 1e-12])
def test_the_error_is_within_its_bound_and_the_triplets_are_near_the_best(tiny):
    sizes = dict.fromkeys(["first", "second", "picture"], RANK + OVERSAMPLING)
    found = sketch_gradients(Wide(), sizes, batches(), loss=lambda model, x: tiny * loss(model, x))
    for name, gradient in exact().items():
        sketch, gradient = found[name], tiny * gradient.double()
        values = torch.linalg.svdvals(gradient)
        size, power = min(gradient.shape), 1 / (2 * POWERS + 1)
        factor = 1 + math.sqrt(RANK / (OVERSAMPLING - 1))
        factor += math.e * math.sqrt(RANK + OVERSAMPLING) / OVERSAMPLING * math.sqrt(size - RANK)
        error = torch.linalg.matrix_norm(gradient - sketch.dense().double(), 2)
        assert error <= factor**power * values[RANK]
        left = torch.linalg.svd(gradient)[0][:, :RANK]
        angle = torch.linalg.svdvals(left.T @ sketch.left[:, :RANK].double()).min()
        assert angle > 0.99
        kept = sketch.values[:RANK].double().square().sum() / values[:RANK].square().sum()
        assert 0.999 < kept <= 1 + 1e-5
        for block in (sketch.left, sketch.right):
            assert relative_gap(block.T @ block, torch.eye(RANK + OVERSAMPLING)) < 1e-4


def test_a_gradient_of_low_rank_has_no_error():
    """A batch of few rows: no layer's gradient has more than that rank."""
    names = ["first"]
    found = sketch_gradients(Wide(), {"first": 20}, batches(1, rows=3), loss=loss)
    whole = collect_gradients(Wide(), names, batches(1, rows=3), loss=loss)["first"]
    assert relative_gap(found["first"].dense(), whole) < 1e-5


def configuration(method):
    return LoraConfig(
        r=RANK, target_modules=["first", "second", "picture"], init_lora_weights=method
    )


def limit(method, share=0.6):
    plan = get_peft_model(Wide(), configuration(method), dry_run=True)
    return int(share * plan.statistics_bytes)


@pytest.mark.parametrize("method", ["lora_ga", "lora_one"])
def test_methods_use_it_where_the_gradients_do_not_fit(method):
    passes, model = [], Wide()
    model.first.register_forward_hook(lambda *_: passes.append(None))
    data, memory = WithLoss(batches(), loss), limit(method)
    plan = get_peft_model(model, configuration(method), calibration_memory=memory, dry_run=True)
    assert "4 passes" in str(plan)
    assert "sketched" in str(plan)
    assert plan.statistics_bytes <= memory
    sketched = get_peft_model(
        model, configuration(method), calibration=data, calibration_memory=memory
    )
    assert len(passes) == 2 * (POWERS + 1) * len(batches())
    whole = get_peft_model(Wide(), configuration(method), calibration=data)
    for name, layer in sketched.layers.items():
        other = whole.layers[name]
        gap = relative_gap(layer.initial_product(), other.initial_product())
        assert gap < 0.05, name
    again = get_peft_model(
        Wide(), configuration(method), calibration=data, calibration_memory=memory
    )
    assert torch.equal(again.layers["first"].lora_A, sketched.layers["first"].lora_A)
    large = get_peft_model(
        Wide(), configuration(method), calibration=data, calibration_memory=limit(method, 1.0)
    )
    assert torch.equal(large.layers["first"].lora_A, whole.layers["first"].lora_A)


def test_what_cannot_be_sketched_is_refused_by_name():
    data = WithLoss(batches(), loss)
    with pytest.raises(ValueError, match="gora's gradients, which one pass collects, take"):
        get_peft_model(
            Wide(), configuration("gora"), calibration=data, calibration_memory=limit("gora")
        )
    with pytest.raises(ValueError, match="sketches of the gradients for lora_ga take"):
        get_peft_model(Wide(), configuration("lora_ga"), calibration=data, calibration_memory=1000)
    generator = WithLoss((batch for batch in batches()), loss)
    with pytest.raises(ValueError, match="4 passes over the batches, and a generator"):
        get_peft_model(
            Wide(), configuration("lora_ga"), calibration=generator,
            calibration_memory=limit("lora_ga"),
        )  # fmt: skip


def test_a_calibration_that_was_made_before_needs_no_memory():
    found = calibrate(Wide(), configuration("lora_ga"), WithLoss(batches(), loss))
    whole = get_peft_model(Wide(), configuration("lora_ga"), calibration=found)
    same = get_peft_model(
        Wide(), configuration("lora_ga"), calibration=found, calibration_memory=limit("lora_ga")
    )
    assert torch.equal(same.layers["first"].lora_A, whole.layers["first"].lora_A)


@pytest.mark.parametrize("method", ["lora_ga", "lora_one"])
def test_a_calibration_holds_sketches_and_its_file_too(tmp_path, method):
    data, memory = WithLoss(batches(), loss), limit(method)
    direct = get_peft_model(
        Wide(), configuration(method), calibration=data, calibration_memory=memory
    )
    found = calibrate(Wide(), configuration(method), data, calibration_memory=memory)
    assert found.batches == 3
    found.save(tmp_path / "sketches.safetensors")
    for each in (found, Calibration.load(tmp_path / "sketches.safetensors")):
        model = get_peft_model(Wide(), configuration(method), calibration=each)
        for name, layer in model.layers.items():
            assert torch.equal(layer.lora_A, direct.layers[name].lora_A)
            assert torch.equal(layer.lora_B, direct.layers[name].lora_B)


def test_sketches_that_are_too_small_are_refused_by_name():
    data = WithLoss(batches(), loss)
    memory = limit("lora_one")
    found = calibrate(Wide(), configuration("lora_one"), data, calibration_memory=memory)
    with pytest.raises(ValueError, match="holds 20 triplets, and lora_ga needs 24 at r=4"):
        get_peft_model(Wide(), configuration("lora_ga"), calibration=found)
    with pytest.raises(ValueError, match="gora reads whole gradients; run lora_init.calibrate"):
        get_peft_model(Wide(), configuration("gora"), calibration=found)
    both = calibrate(
        Wide(), [configuration("lora_one"), configuration("lora_ga")], data,
        calibration_memory=limit("lora_ga"),
    )  # fmt: skip
    assert {len(layer.gradient.values) for layer in both.layers.values()} == {
        2 * RANK + OVERSAMPLING
    }
    eva = configuration("eva")
    memory = get_peft_model(Wide(), eva, dry_run=True).statistics_bytes - 1
    with pytest.raises(ValueError, match="all statistics for eva take .* bytes together"):
        calibrate(Wide(), eva, data, calibration_memory=memory)


@pytest.mark.parametrize("method", ["lora_ga", "corda"])
def test_a_peft_model_calibrates_in_as_much_memory(method):
    names = ["first", "second"]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, init_lora_weights=method)
    memory = int(0.8 * get_peft_model(Wide(), config, dry_run=True).statistics_bytes)
    settings = {"calibration": WithLoss(batches(), loss), "calibration_memory": memory}
    expected = get_peft_model(Wide(), config, **settings)
    model = peft.get_peft_model(
        Wide(),
        peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, fan_in_fan_out=False),
    )
    initialize_peft_model(model, method, **settings)
    for name in names:
        layer = model.base_model.model.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, expected.layers[name].lora_A)
        assert torch.equal(layer.lora_B["default"].weight, expected.layers[name].lora_B)
