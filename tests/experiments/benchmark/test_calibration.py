"""The calibration pass against plain passes."""

import time

import torch

from experiments.benchmark import calibration, isolated
from experiments.benchmark.settings import CalibrationSettings

CPU = torch.device("cpu")


def test_calibration(settings, in_process):
    rows = calibration.run(settings)
    assert [row.case for row in rows] == ["all linear layers", "q and v"]
    assert [row.figures["layers"] for row in rows] == [13, 4]
    for row in rows:
        assert row.figures["tokens"] == 2 * 4 * 16
        assert row.figures["low"] <= row.ours <= row.figures["high"]
    assert (rows[0].ceiling, rows[1].ceiling) == (2.2, None)


def test_a_calibration_that_breaks_off_is_a_row(settings, monkeypatch):
    """What it told before stays, and the benchmark goes on."""
    told = {
        "case": "all_linear", "plain": [1.0], "observed": [2.0], "batches": 2, "layers": 3,
        "tokens": 128,
    }  # fmt: skip

    def run(*_, hear, **__):
        hear(told)
        return isolated.Outcome([told], "process ended with exit status -9")

    monkeypatch.setattr(calibration, "run_isolated", run)
    heard = []
    first, second = calibration.run(settings, heard.append)
    assert (first.ours, first.note) == (2.0, "")
    assert (second.case, second.ours) == ("q and v", None)
    assert second.note == "process ended with exit status -9"
    assert heard == [first, second]


def test_a_pace_ends_with_its_budget():
    """After two batches; beginning and end are shares of all batches, of which these are two."""
    limits = CalibrationSettings(batches=8, least=2, budget=0)
    pace = calibration.Pace([{}] * 8, lambda batch: time.sleep(0.001), CPU, limits)

    def consume(batches):
        time.sleep(0.08)
        return list(batches)

    assert pace.over(consume) == [{}, {}]
    assert len(pace.plain) == len(pace.observed) == 2
    assert all(0.01 <= seconds < 0.03 for seconds in pace.observed)


def test_a_pace_counts_everything_its_consumer_does():
    limits = CalibrationSettings(batches=3, budget=10)
    pace = calibration.Pace([{}] * 3, lambda batch: time.sleep(0.001), CPU, limits)

    def consume(batches):
        time.sleep(0.03)
        for _ in batches:
            time.sleep(0.002)

    pace.over(consume)
    assert len(pace.plain) == len(pace.observed) == 3
    assert sum(pace.observed) >= 0.036
    assert min(pace.plain) >= 0.001
