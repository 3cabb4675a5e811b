"""Every strategy beside its peers, on tiny models: what a contest tells."""

import time

import pytest
import torch
from known_rates import RATES
from products import chosen

import lora_init
from experiments.benchmark import (
    clock,
    comparison,
    contest,
    exact,
    initialization,
    references,
    sampling,
)
from experiments.benchmark.cases import Case
from experiments.benchmark.clock import Clock
from experiments.benchmark.strategies import METHODS, STRATEGIES
from experiments.benchmark.tables import markdown_table

CPU = torch.device("cpu")


def test_initialization(settings, in_process):
    """A model's process, its reports and their row."""
    (row,) = initialization.run(settings)
    assert (row.model, row.case, row.peer) == ("llama (synthetic), r 2", "pissa", "PEFT")
    assert None not in (row.peft, row.exact)
    assert row.quality["excess"].kept
    assert row.quality["overlap"].ours > 0.999
    assert 0 <= row.figures["ours gap"] < 1e-4
    assert row.figures["allowed, MiB"] > 0
    assert row.figures["ours turns"] == row.figures["PEFT turns"] == 2
    parts = row.figures["ours with, s"], row.figures["ours without, s"]
    assert min(parts) > 0
    assert "pissa" in markdown_table([row], initialization.EXTRA)


@pytest.mark.parametrize("method", chosen(METHODS, "pissa", "corda_ipm"))
def test_every_strategy_on_a_language_model(arena, method):
    """What the process of one model reports, without the process."""
    made, told = arena("llama"), []
    made.chosen.limits = {"eva": 1.0}  # PEFT's would never end
    made.compete(made.request(2, method), told.append)
    case = Case.of([{"rank": 2, "method": method, **report} for report in told], 2, method)
    assert len(case.shapes) == (8 if method == "eva" else 14), "distinct inputs, or layers"
    assert len(case.seconds["ours"]) == 2
    demand = STRATEGIES[method].demand
    if demand is not None and demand.limit is not None:
        kept = comparison.demanding(case.quality[demand.figure], demand).kept
        assert kept, case.quality
    if STRATEGIES[method].exact:
        assert len(case.seconds["exact"]) == 2
    if method in ("kaiming", "gaussian", "orthogonal", "olora", "pissa", "corda_ipm", "corda_kpm"):
        assert case.gaps["ours"] < 1e-4
        assert case.gaps["peft"] < 2e-3
        assert len(case.seconds["peft"]) == 2


@pytest.mark.parametrize("method", chosen(["olora", "corda_kpm", "eva", "bottom"], "olora"))
def test_a_single_layer_needs_no_tokenizer(arena, method):
    made, told = arena("layer"), []
    assert "lora_ga" not in made.methods, "it has no loss"
    made.chosen.limits = {"eva": 1.0}
    made.compete(made.request(2, method), told.append)
    case, demand = Case.of(told, 2, method), STRATEGIES[method].demand
    assert comparison.demanding(case.quality[demand.figure], demand).kept


def test_full_decompositions_are_remembered(arena):
    made, told = arena("layer"), []
    made.entrants.remembered = {("exact", "svd"): 5.0, ("peft", "mica"): 7.0}
    made.compete(made.request(2, "bottom"), told.append)
    case = Case.of(told, 2, "bottom")
    assert case.seconds["exact"] == {0: 5.0}
    assert case.seconds["peft"] == {0: 7.0}
    assert case.notes == [
        "torch.linalg: a full decomposition, measured in a row above",
        "PEFT: a full decomposition, measured in a row above",
    ]


def test_what_would_take_too_long_is_not_begun(arena):
    made, told = arena("layer"), []
    made.chosen.peer_limit = 1e-9
    made.compete(made.request(2, "pissa"), told.append)
    errors = {report["contender"]: report["error"] for report in told if "error" in report}
    assert errors == {"exact": "not run", "peft": "not run"}


def test_when_the_seconds_are_over_everyone_has_one_turn(arena, monkeypatch):
    """Ours is measured all the same; a peer that would take longer than is left is not begun."""
    monkeypatch.setattr(clock, "CHEAP", 0.0)
    made, told = arena("layer"), []
    made.allowance.start(Clock(0.0), 1)
    made.compete(made.request(2, "pissa"), told.append)
    case = Case.of(told, 2, "pissa")
    assert case.seconds.keys() == {"ours"}
    assert case.quality["excess"].keys() == {"ours"}
    assert len(case.seconds["ours"]) == 1
    assert case.notes == [
        f"{peer}: not run: 0 s of the model's share of `seconds` are left for it"
        for peer in ("torch.linalg", "PEFT")
    ]


def test_an_optional_models_strategies_are_left_out_when_its_share_is_used_up(settings):
    """Those that come last: the dear ones."""
    settings.models["layer"].optional = True
    settings.initialization.methods = ["pissa", "kaiming"]
    told = []
    contest.contest(settings, told.append, "layer", vars(RATES), [], ends=0.0)
    assert [t["method"] for t in told if t.keys() == {"rank", "method"}] == ["kaiming", "pissa"]
    for method in ("kaiming", "pissa"):
        case = Case.of([t for t in told if t.get("method") == method], 2, method)
        (row,) = comparison.rows_of("layer", case, settings, RATES, None)
        assert (row.ours, row.verdict) == (None, None)
        assert row.note == f"ours: {contest.OVER}"


def test_a_dear_reference_is_timed_on_some_layers(arena, monkeypatch):
    """Each shape's time is that of its computed layers, as many times as it has layers."""
    made = arena("llama")
    plan = made.provisions.plan(made.request(2, "loftq"))
    shapes = [target.shape for target in plan.targets]
    monkeypatch.setattr(references, "DEAR", 1)  # one layer of a shape
    all_of_them = sampling.choose("svd", plan.targets, shapes, RATES, affordable=1e9)
    assert all_of_them.note == ""
    assert all_of_them.needed == exact.expected("svd", shapes, RATES)
    sample = sampling.choose("svd", plan.targets, shapes, RATES, affordable=0.0)
    assert sample.note == "torch.linalg: timed on 4 of 14 layers, and scaled by shape"
    assert sample.needed == exact.expected("svd", list(sample.names), RATES)

    def run(given):
        time.sleep(0.02 * len(given.weights))
        return dict.fromkeys(given.weights, 1.0)

    monkeypatch.setitem(exact.COMPUTATIONS, "svd", exact.Computation(run))
    given = made.provisions.given(made.request(2, "loftq"), plan)
    found = sampling.compute("svd", given, sample, CPU)
    assert found.results.keys() == {name for names in sample.names.values() for name in names}
    assert 0.28 <= found.seconds < 0.9, "14 layers of 0.02 s, of which 4 were computed"


def test_one_round_stands_for_those_that_cost_the_same(arena, monkeypatch):
    """Of shapes that are dear by themselves; the row says so, and no result comes of it."""
    made = arena("llama")
    plan = made.provisions.plan(made.request(2, "loftq"))
    shapes = [target.shape for target in plan.targets]
    monkeypatch.setattr(references, "DEAR", 1)  # one layer of a shape
    dear = exact.expected("alternation", [(24, 16)], RATES)
    sample = sampling.choose("alternation", plan.targets, shapes, RATES, affordable=0.9 * dear)
    assert sample.once == {(24, 16), (16, 24)}
    assert sample.note.endswith("; of 16×24, 24×16 one round of 5, counted 5 times")
    each = [shape for shape, names in sample.names.items() for _ in names]
    rest = [shape for shape in each if shape not in sample.once]
    once = [shape for shape in each if shape in sample.once]
    assert sample.needed == pytest.approx(
        exact.expected("alternation", rest, RATES) + exact.expected("alternation", once, RATES) / 5
    )
    asked = []

    def run(given):
        asked.append(given.alternations)
        time.sleep(0.02 * given.alternations)
        return dict.fromkeys(given.weights, 1.0)

    monkeypatch.setitem(exact.COMPUTATIONS, "alternation", exact.Computation(run, rounds=5))
    given = made.provisions.given(made.request(2, "loftq"), plan)
    found = sampling.compute("alternation", given, sample, CPU)
    assert sorted(asked) == [1, 1, 5, 5]
    named = {
        name for shape, names in sample.names.items() if shape not in sample.once for name in names
    }
    assert found.results.keys() == named
    assert found.seconds >= 4 * 5 * 0.02 * 0.9


@pytest.mark.exhaustive
def test_strategies_share_a_pass(arena, monkeypatch):
    """Those that read sums of one precision; each gets them as they were collected."""
    made, passes = arena("llama"), []
    calibrate = lora_init.calibrate
    monkeypatch.setattr(
        lora_init, "calibrate", lambda *given: passes.append(0) or calibrate(*given)
    )
    told, methods = [], ("corda_ipm", "corda_kpm", "eva")
    made.provisions.collecting = methods
    made.subject.settings.peft = made.subject.settings.exact = []
    made.chosen.repetitions = 1
    for method in methods:
        made.compete(
            made.request(2, method), lambda t, method=method: told.append({"method": method, **t})
        )
    assert len(passes) == 2, "CorDA's smallest triplets are of sums in float64"
    of_eva = Case.of([t for t in told if t["method"] == "eva"], 2, "eva")
    of_ipm = Case.of([t for t in told if t["method"] == "corda_ipm"], 2, "corda_ipm")
    assert of_eva.calibrated == of_ipm.calibrated > 0
    assert "our pass: one with corda_ipm's" in of_eva.notes
    kept = [
        layer.inputs._components
        for found in made.provisions.collected
        for layers in found.calibration.requests.values()
        for layer in layers.values()
    ]
    assert not any(kept), "what an initialization has computed is no one else's"


def test_a_dear_strategys_peak_is_that_of_its_turn(arena, monkeypatch):
    monkeypatch.setattr(contest, "DEAR_FLOOR", 0.0)
    made, told = arena("llama"), []
    monkeypatch.setattr(made, "peak", None)  # no call of its own
    made.compete(made.request(2, "pissa"), told.append)
    case = Case.of(told, 2, "pissa")
    assert case.peak is not None
    assert case.allowed > 0
    assert "peak: of the timed call, on all layers, without a pass" in case.notes
    assert len(case.seconds["ours"]) == 2


def test_needs_follow_floors_and_computations(arena):
    made = arena("llama")
    requests = [made.request(2, method) for method in ("kaiming", "pissa", "bottom", "loftq")]
    found = made.needs(requests)
    assert min(found) >= made.chosen.reserve
    assert found[1] > found[2], "both ask for the same decomposition: it counts once"
    made.subject.settings.exact = []
    assert made.needs(requests)[1] < found[1]


def test_a_sampled_alternation_still_judges_quality(arena):
    made, told = arena("llama"), []
    made.chosen.exact_limit = 0.0
    made.compete(made.request(2, "loftq"), told.append)
    case = Case.of(told, 2, "loftq")
    assert comparison.demanding(case.quality["objective over exact"], None).ours < 1e-3
    assert len(case.seconds["exact"]) == 2
