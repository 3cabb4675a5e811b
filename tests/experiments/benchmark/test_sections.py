"""Every section measures tiny models, compared with PEFT."""

import pytest
import torch

from experiments.benchmark import (
    calibration,
    contenders,
    experts,
    initialization,
    memory,
    peaks,
    sharded,
    steps,
)
from experiments.benchmark.schema import ShardedSettings
from experiments.benchmark.strategies import METHODS, STRATEGIES
from experiments.benchmark.synthetic import parameters
from experiments.benchmark.workload import load_workload, sampled
from experiments.errors import RunFailed

LIMITS = {"olora": 1e-5, "loftq": 1e-2} | {f"pissa_niter_{count}": 0.3 for count in (1, 2, 4)}


def rows_of(section, settings):
    return [row for case in section.cases(settings) for row in case.measure()]


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_initialization_measures_every_method(settings):
    settings.initialization.methods = list(METHODS)
    settings.initialization.rounds = 1
    rows = rows_of(initialization, settings)
    assert [row.case for row in rows] == list(METHODS)
    for row in rows:
        strategy = STRATEGIES[row.case]
        assert row.ours > 0
        assert row.rank == 2
        assert (row.linalg is not None) == (strategy.formula is not None)
        assert ("PEFT failed" in row.note) == (strategy.peft is not None and row.peft is None)
        assert ("4 of 14 layers" in row.note) == strategy.decomposes == (row.whole is not None)
        assert row.ratio is not None
        if row.kind:
            assert row.error < LIMITS.get(row.case, 1e-3)
    failed = [row.case for row in rows if "PEFT failed" in row.note]
    assert set(failed) <= {"loftq"}  # PEFT's needs CUDA


def test_peers_that_are_not_wanted_take_no_part(settings):
    settings.models["llama"].peers = []
    pissa, _ = rows_of(initialization, settings)
    assert pissa.ours > 0
    assert (pissa.peft, pissa.linalg, pissa.ratio) == (None, None, None)


def test_calibration_is_a_multiple_of_plain_passes(settings):
    rows = rows_of(calibration, settings)
    assert [row.case for row in rows] == ["all linear layers", "query and value"]
    for row in rows:
        assert row.ratio.estimate > 0
        assert row.note == "128 tokens"


def test_memory_compares_with_the_plan(settings, monkeypatch):
    monkeypatch.setattr(memory, "in_fresh_process", memory.peaks_of)
    (row,) = rows_of(memory, settings)
    assert (row.unit, row.case, row.note) == ("MiB", "pissa", "")
    assert None not in (row.ours, row.peft)
    assert row.planned > 0


@pytest.mark.exhaustive
def test_memory_is_measured_in_a_fresh_process(settings):
    found = memory.in_fresh_process(settings, "encoder", "lora_init")
    assert found["pissa"]["planned"] > 0


def test_steps_of_both_libraries_have_equal_losses(settings):
    rows = rows_of(steps, settings)
    assert [row.case for row in rows] == ["LoRA", "DoRA"]
    for row in rows:
        assert min(row.ours, row.peft) > 0
        assert row.error <= 1e-5


def test_a_mixture_of_experts_is_compared_with_peft_and_the_floor(settings):
    step, memory_of_a_step, pissa, quick, olora = rows_of(experts, settings)
    assert min(step.ours, step.peft, step.whole) > 0
    assert step.error <= 1e-5
    assert "× the floor" in step.note
    assert memory_of_a_step.unit == "MiB"
    assert min(pissa.linalg, olora.linalg) > 0
    assert max(pissa.error, quick.error) <= 1e-4
    assert olora.note == "8 matrices"


@pytest.mark.exhaustive
def test_a_sharded_base_is_measured_by_ranks(settings):
    """Fresh processes import torch for seconds. The small layers hide in fixed costs of gloo."""
    settings.sharded = ShardedSettings(ranks=[1, 2], layers=4, width=512)
    rows = rows_of(sharded, settings)
    assert [(row.case.partition(", ")[2], row.unit) for row in rows] == [
        ("1 rank: memory", "MiB"), ("1 rank: time", "s"),
        ("2 ranks: memory", "MiB"), ("2 ranks: time", "s"),
    ]  # fmt: skip
    assert min(rows[1].ours, rows[3].ours) > 0
    assert rows[2].planned == rows[0].ours + 1


def test_models_with_different_adapters_are_not_compared(settings):
    request = contenders.Request("SEQ_CLS", 2, 4, 0)
    ours, theirs = (load_workload("encoder", settings).model for _ in range(2))
    ours = contenders.adapt_ours(ours, request)
    theirs = contenders.adapt_peft(
        theirs, contenders.Request("SEQ_CLS", 2, 4, 0, exclude=".*pooler.*")
    )
    with pytest.raises(RunFailed, match=r"different layers, e\.g\. .*pooler"):
        contenders.copy_factors(ours, theirs)


@pytest.mark.parametrize("name", ["encoder", "decoder", "llama"])
def test_batches_have_the_stated_shape(settings, name):
    workload = load_workload(name, settings)
    batches = workload.training_batches(3)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 8)] * 3
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert all("labels" in batch for batch in batches)
    batches = workload.calibration_batches()
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 16)] * 2
    assert all("labels" not in batch for batch in batches)


def test_a_synthetic_llama_has_known_weights(settings):
    workload = load_workload("llama", settings)
    assert len(workload.known) == 14
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(workload.model.get_submodule(name).weight, workload.known[name].weight())
    shape = settings.models["llama"].llama
    norms = 5 * shape.hidden
    counted = sum(parameter.numel() for parameter in workload.model.parameters())
    assert counted == parameters(shape) + norms


def test_the_sample_is_spread_over_the_layers_of_each_shape():
    shapes = {f"small.{i}": (4, 4) for i in range(30)} | {"large.0": (9, 9), "large.1": (9, 9)}
    assert sampled(shapes, 3) == ("small.0", "small.14", "small.29", "large.0", "large.1")
    assert sampled(shapes, None) == tuple(shapes)


def test_a_peak_includes_memory_that_was_freed_again():
    watch = peaks.HostPeak()
    block = torch.ones(30 * peaks.MIB // 4)
    del block
    if not watch.note:
        assert 28 <= watch.rise() / peaks.MIB <= 60
