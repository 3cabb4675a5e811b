"""The benchmark's seconds: how they are shared out, and what ends what does not end."""

import time

import pytest
from known_rates import RATES

from experiments.benchmark import initialization, isolated, memory
from experiments.benchmark.clock import Allowance, Clock
from experiments.benchmark.limits import OutOfTime, time_limit


def test_an_allowance_keeps_something_for_what_is_to_come():
    allowance = Allowance(reserve=4.0)
    assert allowance.refusal(1e9) is None, "without a clock there is no end"
    allowance.start(Clock(30.0), 3)
    allowance.begin_strategy()
    assert 21.0 < allowance.free <= 22.0
    assert allowance.refusal(21.0) is None
    left = "22 s of the model's share of `seconds` are left for it"
    assert allowance.refusal(40.0) == f"about 40 s, and {left}"
    allowance.start(Clock(6.0), 3)
    allowance.begin_strategy()
    assert 3.5 < allowance.free <= 4.0, "half of the whole is not kept in reserve"
    allowance.start(Clock(30.0), 3, [1.0, 2.0, 20.0])
    allowance.begin_strategy()
    assert 7.5 < allowance.free <= 8.0
    allowance.begin_strategy()
    assert 9.5 < allowance.free <= 10.0, "what is to come needs less"
    allowance.start(Clock(10.0), 2, [5.0, 100.0])
    allowance.begin_strategy()
    assert 1.0 < allowance.free <= 1.5, "nine tenths of the whole are kept at most"
    assert allowance.refusal(9.0) is not None
    assert allowance.refusal(9.0, first=True) is None, "it comes before what is to come"
    allowance.start(Clock(0.0), 3)
    assert allowance.over
    assert allowance.refusal(1.0) is None, "cheap ones come in any case"
    assert allowance.refusal(3.0) is not None


def test_a_clock_is_shared_out():
    assert Clock().part(0.5).ends is None
    assert Clock.until(None).left == float("inf")
    clock = Clock(100.0)
    half = clock.part(0.5)
    assert 49 < half.left <= 50
    assert Clock.until(half.ends).left == pytest.approx(half.left, abs=1)
    assert Clock(-5.0).part(0.5).left <= 0


def test_models_share_what_is_left(settings, monkeypatch):
    """By their shares; a model that takes less leaves the rest to those behind it."""
    given = []
    monkeypatch.setattr(initialization, "measure_rates", lambda _: RATES)
    monkeypatch.setattr(
        initialization, "measure", lambda name, *rest: given.append((name, rest[-1].left)) or []
    )
    settings.models["llama"].share, settings.models["layer"].share = 3.0, 1.0
    settings.initialization.models = ["llama", "layer"]
    initialization.run(settings, clock=Clock(100.0))
    assert given == [("llama", pytest.approx(75, abs=1)), ("layer", pytest.approx(100, abs=1))]


def endless():
    while True:
        pass


def test_a_time_limit_ends_an_endless_loop():
    with pytest.raises(OutOfTime, match=r"no end within 0\.05 s"), time_limit(0.05):
        endless()
    with time_limit(0.05):
        pass
    time.sleep(0.08)  # a limit that was kept is over


def test_a_process_that_does_not_end_is_stopped(settings):
    outcome = isolated.run_isolated(memory.measure, settings, 0.2, contender="ours", name="encoder")
    assert outcome == isolated.Outcome([], "no end within 0.2 s")


def test_reasons_are_short():
    assert isolated.brief(KeyError("a\nb"), 20) == "KeyError: 'a\\nb'"
    assert len(isolated.brief(ValueError("x" * 500))) == 160
    assert isolated.last_line("Traceback\n  File x\nIndexError: out\n\n") == "IndexError: out"
