"""Calibration within a memory budget, in several passes."""

import gc
import weakref

import pytest
import torch
from measures import assert_unchanged, relative_gap, snapshot
from models import llama, token_batches
from products import chosen
from torch import nn

from lora_init import LoraConfig, get_peft_model
from lora_init.calibration import collect
from lora_init.linalg.moments import sums_bytes

pytestmark = pytest.mark.sampled(3)

TARGETS = ["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CPU = torch.device("cpu")
# What `llama`'s inputs take: down_proj reads one 96 wide, the others' are 64.
WIDE, NARROW = sums_bytes(96, torch.float32), sums_bytes(64, torch.float32)
EVA = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}
UNCENTRED = {"init_lora_weights": "eva", "eva_config": {"rho": 1.5, "center": False}}
CORDA = {"init_lora_weights": "corda"}


class Counting(nn.Module):
    """How often a model is called."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.calls = model, model.config, 0

    def forward(self, **batch):
        self.calls += 1
        return self.model(**batch)


def config_for(method, targets=TARGETS, **more):
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, **method, **more)


def adapted(method, calibration=None, model=None, **limits):
    if calibration is None:
        calibration = token_batches()
    return get_peft_model(model or llama(), config_for(method), calibration=calibration, **limits)


def assert_same_start(model, expected, tolerance=1e-6):
    assert model.layers.keys() == expected.layers.keys()
    for name, layer in model.layers.items():
        other = expected.layers[name]
        assert layer.scaling == other.scaling
        for part in ("lora_A", "lora_B"):
            actual, wanted = getattr(layer, part).detach(), getattr(other, part).detach()
            if wanted.any():
                assert relative_gap(actual, wanted) <= tolerance, (name, part)
            else:
                assert not actual.any()


# -- several passes --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [CORDA, EVA, UNCENTRED], ids=["corda", "eva", "uncentred"])
@pytest.mark.parametrize(("memory", "passes"), [(WIDE, 8), (WIDE + NARROW, 4)])
def test_passes_over_groups_of_layers_give_the_same_adapter(method, memory, passes):
    """In each of two blocks q and k share an input, gate and up too; o and down have their own."""
    model = Counting(llama())
    batches = token_batches()
    found = adapted(method, batches, model, calibration_memory=memory)
    assert model.calls == passes * len(batches)
    expected = adapted(method, batches, Counting(llama()))
    assert_same_start(found, expected)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert found.init_report().calibration_tokens == tokens


def test_one_pass_where_everything_fits_even_from_a_generator():
    everything = 2 * (WIDE + 3 * NARROW)
    found = adapted(CORDA, iter(token_batches()), calibration_memory=everything)
    assert_same_start(found, adapted(CORDA))


def test_batches_that_can_be_read_only_once_are_refused_at_the_first():
    batches = iter(token_batches())
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no room for the inputs of .* pass a list or a loader"):
        adapted(CORDA, batches, model, calibration_memory=WIDE)
    assert len(list(batches)) == 2
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "method", chosen([CORDA, EVA], EVA), ids=lambda one: one["init_lora_weights"]
)
@pytest.mark.wrong_types
def test_statistics_are_let_go_before_the_next_pass(method, monkeypatch):
    alive = weakref.WeakSet()
    largest = []
    collect_inputs = collect._collect_inputs
    statistics_of = collect.statistics_of

    def before_a_pass(*args):
        gc.collect()
        largest.append(len(alive))
        return collect_inputs(*args)

    def noted(moments):
        found = statistics_of(moments)
        alive.add(found.covariance)
        return found

    monkeypatch.setattr(collect, "_collect_inputs", before_a_pass)
    monkeypatch.setattr(collect, "statistics_of", noted)
    adapted(method, calibration_memory=WIDE)
    assert largest == [0] * 8


def test_the_plan_says_what_will_happen():
    config = config_for(CORDA)
    plan = get_peft_model(llama(), config, dry_run=True, calibration_memory=WIDE)
    assert plan.passes >= 8  # which layers share their inputs is not known yet
    assert f"up to {plan.passes} passes over the calibration data" in str(plan)
    whole = get_peft_model(llama(), config, dry_run=True)
    assert (whole.passes, plan.statistics_bytes) == (1, whole.statistics_bytes)
    assert whole.statistics_bytes == 2 * (5 * NARROW + WIDE)
    assert "passes" not in str(whole)
    none = get_peft_model(llama(), LoraConfig(target_modules=TARGETS), dry_run=True)
    assert none.passes == 0


class Changing(nn.Module):
    """Two layers that share their input in some batches only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, split):
        self.first(x)
        return self.second(2 * x if split else x)


def test_a_layer_whose_inputs_never_fit_together_ends_with_an_error():
    batches = [[torch.randn(9, 6), split] for split in (False, True)]
    config = LoraConfig(r=2, target_modules=["first", "second"], **CORDA)
    with pytest.raises(ValueError, match="do not fit together"):
        get_peft_model(
            Changing(), config, calibration=batches, calibration_memory=sums_bytes(6, torch.float32)
        )


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("limits", "method", "message"),
    [
        ({"calibration_memory": WIDE - 1}, CORDA, rf"down_proj' alone take {WIDE} bytes"),
        ({"calibration_memory": 0}, CORDA, "calibration_memory=0 is not supported"),
        ({"calibration_memory": 1e9}, CORDA, "calibration_memory=1000000000.0 is not"),
        ({"calibration_memory": 10**4}, {"init_lora_weights": "gora"}, "gradients.*one pass"),
        ({"calibration_memory": 10**4}, {"init_lora_weights": "lora_ga"}, "sketches.*lora_ga take"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused_before_anything_happens(limits, method, message):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config_for(method), calibration=token_batches(), **limits)
    assert_unchanged(model, before)


def test_methods_without_data_do_not_read_them():
    model = get_peft_model(
        llama(), config_for({"init_lora_weights": "pissa"}), calibration_memory=1
    )
    assert len(model.layers) == 12
