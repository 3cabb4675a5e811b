"""Calibration within a memory budget: exactly, in several passes, or by sketches with an error."""

import gc
import weakref

import pytest
import torch
from measures import assert_unchanged, relative_gap, snapshot
from models import llama, token_batches
from torch import nn

from lora_init import LoraConfig, get_peft_model
from lora_init.calibration import collect
from lora_init.calibration.memory import Budget
from lora_init.calibration.sketch import RunningSketch, SketchedStatistics, random_basis
from lora_init.moments import InputStatistics

TARGETS = ["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CPU = torch.device("cpu")
# What `llama`'s inputs take: down_proj reads one 96 wide, the others' are 64.
WIDE, NARROW = Budget().bytes(96), Budget().bytes(64)
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


@pytest.mark.parametrize("method", [CORDA, EVA], ids=["corda", "eva"])
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
    sketched = get_peft_model(llama(), config, dry_run=True, calibration_sketch=8)
    assert "wider than 8 are sketched" in str(sketched)
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
            Changing(), config, calibration=batches, calibration_memory=Budget().bytes(6)
        )


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("limits", "method", "message"),
    [
        ({"calibration_memory": WIDE - 1}, CORDA, rf"down_proj' alone take {WIDE} bytes"),
        ({"calibration_memory": 0}, CORDA, "calibration_memory=0; allowed are"),
        ({"calibration_memory": 1e9}, CORDA, "calibration_memory=1000000000.0; allowed are"),
        ({"calibration_sketch": True}, EVA, "calibration_sketch=True; allowed are"),
        ({"calibration_sketch": 7}, EVA, "reads 8 directions .* better 32"),
        (
            {"calibration_sketch": 16},
            {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
            "corda .*kpm.* more of the inputs than their leading directions.*calibration_memory",
        ),
        ({"calibration_memory": 10**4}, {"init_lora_weights": "lora_ga"}, "gradients.*one pass"),
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
        llama(), config_for({"init_lora_weights": "pissa"}), calibration_memory=1,
        calibration_sketch=1,
    )  # fmt: skip
    assert len(model.layers) == 12


# -- sketches --------------------------------------------------------------------------------------

WIDTH = 120
SPECTRA = {
    "flat": torch.ones(WIDTH),
    "power law": torch.arange(1, WIDTH + 1) ** -1.0,
    "steep": 0.7 ** torch.arange(WIDTH),
    "low rank": (torch.arange(WIDTH) < 10).float(),
    "outlier": torch.cat([torch.tensor([1e6]), torch.ones(WIDTH - 1)]),
    "zero": torch.zeros(WIDTH),
}


def rows_with(spectrum, mean, count=700):
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    spread = torch.randn(count, WIDTH, generator=generator) * spectrum.sqrt()
    return spread @ basis + mean * torch.randn(WIDTH, generator=generator)


def sketched(rows, columns, batch=130):
    sums = RunningSketch(random_basis(rows.shape[1], columns, CPU))
    for part in rows.split(batch):
        sums.add(part)
    return SketchedStatistics.of(sums.moments)


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("columns", [8, 40])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_stated_error_bounds_every_norm(name, columns, mean):
    rows = rows_with(SPECTRA[name], mean)
    found = sketched(rows, columns)
    x = rows.double() - rows.double().mean(0)
    exact = x.T @ x / len(x)
    total = float(exact.trace())
    off = torch.linalg.eigvalsh(exact - found.factor.double() @ found.factor.double().T)
    assert found.tokens == len(rows)
    assert abs(found.variance - total) <= 1e-5 * (total or 1.0)
    allowed = found.error * total + 1e-5 * (mean**2 if name == "zero" else 0.0)
    assert float(off.abs().sum()) <= allowed  # nuclear, hence Frobenius and spectral too
    # And it is no idle bound: it is the nuclear norm itself, but for rounding.
    assert found.error * total <= float(off.abs().sum()) + 2e-5 * total
    if name == "low rank" and columns == 40:
        assert found.error <= 2e-5


@pytest.mark.parametrize("center", [True, False])
def test_directions_of_a_sketch_are_those_of_its_covariance(center):
    rows = rows_with(SPECTRA["steep"], 0.3)
    found, exact = sketched(rows, 40), InputStatistics.of_rows(rows)
    values, vectors, total = found.principal_components(6, center)
    wanted, directions, everything = exact.principal_components(6, center)
    assert relative_gap(total, everything) <= 1e-5
    assert ((values - wanted).abs() <= 2 * found.error * everything).all()
    assert (vectors * directions).sum(0).abs().min() >= 0.999
    assert relative_gap(vectors.T @ vectors, torch.eye(6)) <= 1e-5
    assert relative_gap(found.second_moment, exact.second_moment) <= 2 * found.error
    with pytest.raises(ValueError, match="larger calibration_sketch"):
        found.principal_components(42, center)


@pytest.mark.parametrize("method", [EVA, CORDA], ids=["eva", "corda"])
def test_a_sketch_takes_one_pass_and_reports_its_error(method):
    model = Counting(llama())
    batches = iter(token_batches(size=8))
    found = adapted(method, batches, model, calibration_sketch=24)
    assert model.calls == 3
    details = [row.details for row in found.init_report().layers]
    assert all(0 < row["calibration_error"] < 0.3 for row in details)


def test_inputs_that_are_no_wider_than_the_sketch_are_exact():
    found = adapted(CORDA, calibration_sketch=96)
    assert_same_start(found, adapted(CORDA))
    errors = {row.details["calibration_error"] for row in found.init_report().layers}
    assert errors == {0.0}


def test_a_sketch_within_a_budget():
    budget = Budget(columns=16)
    found = adapted(EVA, calibration_sketch=16, calibration_memory=budget.bytes(96))
    assert_same_start(found, adapted(EVA, calibration_sketch=16))
