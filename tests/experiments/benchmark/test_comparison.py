"""From what a model's process told to rows of the table."""

from known_rates import RATES

from experiments.benchmark import comparison, initialization, isolated
from experiments.benchmark.cases import Case
from experiments.report.statistics import Interval


def test_a_process_that_breaks_off(settings, monkeypatch):
    """The strategy at hand is lost, another process goes on behind it."""
    outcomes = [
        isolated.Outcome([{"rank": 2, "method": "pissa"}], "process ended with Killed"),
        isolated.Outcome([{"rank": 2, "method": "olora"}]),
    ]
    asked = []

    def run(*_, begun, hear, **__):
        asked.append(list(begun))
        outcome = outcomes[len(asked) - 1]
        for report in outcome.reports:
            hear(report)
        return outcome

    monkeypatch.setattr(initialization, "run_isolated", run)
    rows = initialization.measure("llama", settings, RATES)
    assert asked == [[], [(2, "pissa")]]
    assert [row.note for row in rows] == ["process: process ended with Killed", ""]
    outcomes[:] = [isolated.Outcome([], "no end within 1 s")] * 3
    (row,) = initialization.measure("llama", settings, RATES)
    assert row.note == "no end within 1 s"


def test_rows_of_known_times(settings):
    """Five pairs give an interval; calls without the method and passes are taken off."""
    reports = [{"pass": 4.0, "shapes": [[8, 8]]}]
    for number in range(5):
        reports += [
            {"contender": "ours", "round": number, "seconds": 3.0, "calibration": 0.5},
            {"contender": "ours without", "round": number, "seconds": 0.5},
            {"contender": "peft", "round": number, "seconds": 31.0, "calibration": 10.0},
            {"contender": "peft without", "round": number, "seconds": 1.0},
        ]
    reports.append({"contender": "exact", "error": "not run"})
    settings.models["llama"].targets = {"corda_ipm": 8, "eva": 0.3}
    plain = {"plain": [1.0] * 4, "tokens": 8_192}
    (row,) = comparison.rows_of("llama", Case.of(reports, 2, "corda_ipm"), settings, RATES, plain)
    assert (row.ours, row.peft, row.exact) == (2.0, 20.0, None)
    assert row.ratio == Interval(10.0, 10.0, 10.0)
    assert (row.verdict, row.note) == ("met", "torch.linalg: not run")
    _, share = comparison.rows_of("llama", Case.of(reports, 2, "eva"), settings, RATES, plain)
    assert (share.ours, share.ceiling, share.verdict) == (0.25, 0.3, "met")
    assert share.note == "plain passes over 16,384 tokens take 8.00 s, by those over 8,192"


def test_a_missed_demand_is_a_missed_target(settings):
    reports = [
        {"contender": "ours", "round": 0, "seconds": 2.0, "quality": {"excess": 3e-4}},
        {"contender": "ours without", "round": 0, "seconds": 1.0},
        {"contender": "peft", "round": 0, "seconds": 9.0, "quality": {"excess": 1e-3}},
        {"contender": "peft without", "round": 0, "seconds": 1.0},
    ]
    for method, expected in (("pissa", "missed"), ("pissa_niter_4", "met")):
        (row,) = comparison.rows_of("llama", Case.of(reports, 2, method), settings, RATES, None)
        assert row.verdict == expected, "at a fixed number of iterations PEFT's error is the limit"
        assert row.ratio.estimate == 8.0


def test_a_wanted_ratio_without_a_peer_is_open(settings):
    """What is not known is not met."""
    reports = [
        {"contender": "ours", "round": 0, "seconds": 2.0, "quality": {"excess": 3e-5}},
        {"contender": "ours without", "round": 0, "seconds": 1.0},
        {"contender": "peft", "error": "not run"},
    ]
    settings.models["llama"].targets = {"pissa": 7}
    (row,) = comparison.rows_of("llama", Case.of(reports, 2, "pissa"), settings, RATES, None)
    assert (row.ratio, row.verdict) == (None, "open")
    settings.models["llama"].targets = {}
    (row,) = comparison.rows_of("llama", Case.of(reports, 2, "pissa"), settings, RATES, None)
    assert row.verdict == "met"


def test_a_difference_below_nothing_has_no_ratio():
    reports = [
        {"contender": "ours", "round": 0, "seconds": 1.0},
        {"contender": "ours without", "round": 0, "seconds": 1.1},
        {"contender": "peft", "round": 0, "seconds": 9.0},
        {"contender": "peft without", "round": 0, "seconds": 1.0},
    ]
    assert comparison.ratio_of(Case.of(reports, 2, "eva"), "peft") is None
