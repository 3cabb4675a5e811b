"""The benchmark in small: arithmetic on known numbers, and every section on tiny models.

No time is asserted: a test machine has neighbours.
"""

import io
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from experiments.benchmark import (
    calibration,
    commentary,
    comparison,
    contenders,
    exact,
    floors,
    initialization,
    injection,
    isolated,
    judging,
    memory,
    peaks,
    powerlaw,
    quality,
    rates,
    references,
    sampling,
    steps,
    summary,
    synthetic,
    ticker,
)
from experiments.benchmark.__main__ import benchmark
from experiments.benchmark.cases import Case
from experiments.benchmark.chart import charts
from experiments.benchmark.clock import Allowance, Clock
from experiments.benchmark.contenders import LayerFactors
from experiments.benchmark.contest import Arena
from experiments.benchmark.limits import OutOfTime, time_limit
from experiments.benchmark.powerlaw import PowerLaw
from experiments.benchmark.ratios import paired_ratio
from experiments.benchmark.report import Ledger, environment, machine
from experiments.benchmark.rows import Quality, Row, overall, verdict, verdict_below
from experiments.benchmark.settings import (
    BenchmarkConfig,
    CalibrationSettings,
    InitializationSettings,
    InjectionSettings,
    LayerShape,
    LlamaShape,
    MemorySettings,
    ModelSettings,
    StepsSettings,
    from_plain,
    register_schema,
    resolve,
    to_plain,
)
from experiments.benchmark.strategies import METHODS, STRATEGIES
from experiments.benchmark.subjects import load_subject
from experiments.benchmark.tables import columns, markdown_table, terminal_table
from experiments.benchmark.timing import Contender, order, take_turns
from experiments.errors import ConfigurationError, RunFailed
from experiments.report.statistics import Interval

ROOT = Path(__file__).resolve().parents[2]

register_schema()
CPU = torch.device("cpu")
RATES = rates.Rates(bandwidth=1e10, float32=1e11, float64=5e10, svd=1e9)
TINY = LlamaShape(2, hidden=16, intermediate=24, heads=4, key_value_heads=2, vocabulary=11)

ROWS = [
    Row(
        "steps", "minilm", "LoRA", "s", ours=0.2, peft=0.3, ratio=Interval(1.5, 1.4, 1.6),
        target=0.97, verdict="met", figures={"loss difference": 2e-7},
    ),
    Row("steps", "minilm", "DoRA", "s", note="skipped: not served"),
    Row(
        "memory", "minilm", "pissa", "MiB", ours=7.5, peft=10.0,
        ratio=Interval(4 / 3, 4 / 3, 4 / 3), verdict="met", figures={"promised, MiB": 9.3},
    ),
    Row(
        "initialization", "square (synthetic), r 16", "pissa", "s", ours=0.5, peft=10.0, exact=9.0,
        ratio=Interval(20.0, 20.0, 20.0), target=15, verdict="met",
        quality={"excess": Quality(2e-5, 0.0, 1e-4)}, figures={"floor, s": 0.1, "floors": 5.0},
    ),
    Row(
        "initialization", "square (synthetic), r 16", "eva", "s", ours=0.5, exact=0.4,
        ratio=Interval(0.8, 0.7, 0.9), peer="torch.linalg", note="PEFT: no end within 20 s",
    ),
    Row(
        "initialization", "square (synthetic), r 16", "eva / plain passes", "×", ours=0.2,
        ceiling=0.3, verdict="met",
    ),
]  # fmt: skip


@pytest.fixture
def composed():
    """`composed("sections=[steps]")` is what Hydra makes of these overrides."""
    root = Path(__file__).resolve().parents[2] / "conf" / "benchmark"

    def build(*overrides):
        with initialize_config_dir(str(root), version_base="1.3"):
            return compose("benchmark", overrides=list(overrides))

    return build


@pytest.fixture
def settings(tiny_encoder, tiny_decoder, tmp_path):
    """All sections on tiny models."""
    targets = {"lora": 0.97, "all_linear": 2.2}
    shape = {"batch_size": 2, "tokens": 8, "rows": 4, "row_tokens": 16, "batches": 2, "ranks": [2]}
    return BenchmarkConfig(
        models={
            "encoder": ModelSettings(
                str(tiny_encoder),
                task="SEQ_CLS",
                targets=targets,
                **shape,
            ),
            "decoder": ModelSettings(str(tiny_decoder), **shape),
            "llama": ModelSettings(llama=TINY, **shape),
            "layer": ModelSettings(layer=LayerShape(24, 16), **shape),
        },
        steps=StepsSettings(["encoder", "decoder"], rounds=3, warmup=1, learning_rate=1e-2),
        injection=InjectionSettings(["encoder", "decoder"], repetitions=2),
        memory=MemorySettings(["encoder"], ["pissa"]),
        initialization=InitializationSettings(["llama"], ["pissa"], repetitions=2),
        calibration=CalibrationSettings(["encoder"], batches=2, budget=0),
        rank=2,
        alpha=4,
        threads=1,
        outputs=str(tmp_path),
    )


@pytest.fixture
def in_process(monkeypatch):
    """What runs in a process of its own runs in this one, its reports through JSON all the same."""

    def run(function, settings, time_limit, variables=None, hear=lambda _: None, **arguments):
        told = []

        def report(measured):
            told.append(json.loads(json.dumps(measured)))
            hear(told[-1])

        function(settings, report, **json.loads(json.dumps(arguments)))
        return isolated.Outcome(told)

    for section in (initialization, calibration):
        monkeypatch.setattr(section, "run_isolated", run)
    for name, value in (("STREAM_BYTES", 2**20), ("DECOMPOSED", 16)):
        monkeypatch.setattr(rates, name, value)
    monkeypatch.setitem(rates.PRODUCT_SIZE, "cpu", 32)


@pytest.fixture
def arena(settings):
    """`arena("layer")` is where strategies compete on one of the models, in this process."""
    return lambda name: Arena(load_subject(name, settings), settings, RATES)


# -- arithmetic -----------------------------------------------------------------------------------


def test_ratio_of_pairs():
    assert paired_ratio([2, 4, 600], [1, 2, 300]) == Interval(2.0, 2.0, 2.0)
    ratio = paired_ratio([1.0, 1.1, 1.2, 9.0, 1.1], [1.0] * 5)
    assert ratio.estimate == 1.1, "a single slow step does not move the median"
    assert 1.0 <= ratio.low < ratio.estimate < ratio.high <= 9.0
    assert paired_ratio([3], [2]) == Interval(1.5, 1.5, 1.5)
    for numerator, denominator in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="no pairs"):
            paired_ratio(numerator, denominator)


def test_interval_covers():
    """Known noise: about 95 of 100 intervals contain the true ratio of 1.3."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(100):
        noise = torch.randn(2, 25, generator=generator).mul(0.1).exp()
        ratio = paired_ratio((1.3 * noise[0]).tolist(), noise[1].tolist())
        hits += ratio.low <= 1.3 <= ratio.high
    assert hits >= 85


def test_verdicts():
    assert verdict(Interval(1.0, 0.98, 1.02), 0.97) == "met"
    assert verdict(Interval(1.0, 0.96, 1.02), 0.97) == "open"
    assert verdict(Interval(0.9, 0.88, 0.96), 0.97) == "missed"
    assert verdict(None, 0.97) is None
    assert verdict(Interval(1.0, 1.0, 1.0), None) is None


@pytest.mark.parametrize("count", [2, 4])
def test_order_favours_nobody(count):
    names = list("abcd"[:count])
    rounds = [order(names, number) for number in range(count)]
    for place in range(count):
        assert sorted(r[place] for r in rounds) == names
    pairs = [pair for r in rounds for pair in itertools.pairwise(r)]
    assert len(pairs) == len(set(pairs)) == count * (count - 1)


def test_turns_alternate_and_one_may_leave():
    taking = {name: Contender(lambda n: n, lambda n: 10 * n) for name in ("ours", "peft")}
    seen = []
    for turn in take_turns(taking, 3, CPU, "test"):
        seen.append((turn.round, turn.contender, turn.result))
        if turn.round == 1 and turn.contender == "peft":
            del taking["peft"]
    assert seen == [
        (0, "ours", 0), (0, "peft", 0), (1, "peft", 10), (1, "ours", 10), (2, "ours", 20),
    ]  # fmt: skip


# -- settings -------------------------------------------------------------------------------------


def test_the_yaml_composes_and_travels(composed):
    settings = resolve(composed())
    assert sorted(settings.sections) == ["calibration", "initialization", "injection", "memory"]
    assert settings.models["smollm2"].targets["olora"] == 12
    assert settings.seconds == 780
    assert settings.initialization.methods == list(METHODS)
    assert from_plain(json.loads(json.dumps(to_plain(settings)))) == settings


@pytest.mark.parametrize("model", ["minilm", "smollm2", "llama_47m", "llama2_7b_shapes"])
def test_one_model_alone(composed, model):
    settings = resolve(composed(f"model={model}"))
    assert settings.initialization.models == [model]
    assert settings.injection.models in ([model], ["minilm", "smollm2"])


def test_the_47m_model_has_as_many(composed):
    shape = resolve(composed()).models["llama_47m"].llama
    assert synthetic.parameters(shape) == pytest.approx(47e6, rel=0.01)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sections=[stepz]", "sections: 'stepz'; did you mean 'steps'? allowed are initialization"),
        (
            "injection.models=[bert]",
            "injection.models: 'bert'; allowed are minilm, smollm2, llama_47m",
        ),
        ("steps.rounds=1", "steps.rounds=1; allowed is 2 or more"),
        ("memory.methods=[pisa]", "did you mean 'pissa'?"),
        ("device=mps", "device: 'mps'; allowed are cpu, cuda"),
        ("threads=0", "threads=0; allowed is 1 or more"),
        ("seconds=0", "seconds=0.0; allowed is 1 or more"),
        ("models.minilm.share=0", "models.*.share=0.0; allowed is above 0"),
        ("injection.models=[local]", "models.local.source is not set, but injection.models has"),
        (
            "injection.models=[llama_47m]",
            "injection.models has 'llama_47m', which is synthetic; allowed",
        ),
        ("+initialization.limits.evo=3", "'evo'; did you mean 'eva'?"),
        ("+models.minilm.targets.pisa=3", "a key of models.*.targets: 'pisa'"),
    ],
)
def test_bad_settings(composed, override, told):
    with pytest.raises(ConfigurationError) as error:
        resolve(composed(override))
    assert told in str(error.value)


def test_a_model_is_of_one_kind():
    with pytest.raises(ValueError, match="source and layer are set; a model is one of them"):
        ModelSettings("minilm", layer=LayerShape())


# -- sections -------------------------------------------------------------------------------------


def test_batches_have_the_asked_shape(settings):
    for name in settings.models:
        subject = load_subject(name, settings)
        batches = subject.calibration_batches(3) if name == "layer" else subject.training_batches(3)
        if name == "layer":
            assert [tuple(batch["x"].shape) for batch in batches] == [(64, 16)] * 3
            continue
        assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 8)] * 3
        assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
        assert all("labels" in batch for batch in batches)
        calibration = subject.calibration_batches(3)
        assert [tuple(batch["input_ids"].shape) for batch in calibration] == [(4, 16)] * 3
        assert all("labels" not in batch for batch in calibration)


def test_steps(settings):
    rows = steps.run(settings)
    for model in ("encoder", "decoder"):
        lora, dora, *more = (row for row in rows if row.model == model)
        assert lora.case == "LoRA"
        assert min(lora.ours, lora.peft) > 0
        assert lora.ratio.low <= lora.ratio.estimate <= lora.ratio.high
        assert lora.target == settings.models[model].targets.get("lora")
        assert dora.case == "DoRA"
        if dora.note:
            assert "use_dora" in dora.note
            assert dora.ratio is None
            assert not more
        else:
            assert [row.case for row in more] == ["DoRA's step over LoRA's"]
        for row in (lora, dora):
            assert row.figures.get("loss difference", 0.0) <= 1e-5, "ours and PEFT compute the same"


def test_a_differing_adapter_is_refused(settings):
    subject = load_subject("encoder", settings)
    request = contenders.Request("SEQ_CLS", 2, 4, 0)
    ours = contenders.adapt_ours(subject.model, request)
    other = load_subject("encoder", settings).model
    theirs = contenders.adapt_peft(
        other, contenders.Request("SEQ_CLS", 2, 4, 0, exclude=".*pooler.*")
    )
    with pytest.raises(RunFailed, match=r"different layers, e\.g\. .*pooler"):
        contenders.copy_factors(ours, theirs)


def test_injection(settings):
    for row in injection.run(settings):
        stages = [row.figures[f"our {stage}, s"] for stage in ("plan", "initialize", "inject")]
        assert all(spent > 0 for spent in stages)
        assert max(stages) <= 1.5 * row.ours
        assert row.target == 1.0
    assert injection.split(5.0, {"initialize": 1.0, "inject": 2.0, "total": 3.0}) == {
        "plan": 2.0, "initialize": 1.0, "inject": 2.0,
    }  # fmt: skip


def test_memory(settings):
    (row,) = memory.run(settings)
    assert row.unit == "MiB"
    assert row.note == ""
    assert None not in (row.ours, row.peft, row.figures["promised, MiB"])
    parts = row.figures["factors, MiB"] + row.figures["workspace, MiB"]
    assert row.figures["promised, MiB"] == pytest.approx(parts)


def test_the_peak_is_seen_after_it_is_gone():
    watch = peaks.HostPeak()
    block = torch.ones(30 * peaks.MIB // 4)
    del block
    if not watch.note:
        assert 28 <= watch.rise() / peaks.MIB <= 60


HANDED_BACK = """
import torch
from experiments.benchmark import peaks

with peaks.handing_back():
    blocks = [torch.ones(peaks.MIB // 4) for _ in range(30)]
    watch = peaks.HostPeak()
    del blocks
    print("unknown" if watch.note else (watch.start - peaks.status("VmRSS")) // peaks.MIB)
"""


def test_small_blocks_are_handed_back_at_once():
    """In a process of its own, as the benchmark does: this one's heap has a history."""
    told = subprocess.run(
        [sys.executable, "-c", HANDED_BACK], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert told.stdout.strip() == "unknown" or int(told.stdout) >= 25


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


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", ["olora", "corda_kpm", "eva", "bottom"])
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


def test_when_the_seconds_are_over_everyone_has_one_turn(arena):
    """Ours is measured all the same; a peer that would take longer than is left is not begun."""
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


def test_an_allowance_keeps_something_for_what_is_to_come():
    allowance = Allowance(reserve=4.0)
    assert allowance.refusal(1e9) is None, "without a clock there is no end"
    allowance.start(Clock(20.0), 3)
    allowance.begin_strategy()
    assert 11.0 < allowance.free <= 12.0
    assert allowance.refusal(11.0) is None
    left = "12 s of the model's share of `seconds` are left for it"
    assert allowance.refusal(30.0) == f"about 30 s, and {left}"


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


def test_a_sampled_alternation_still_judges_quality(arena):
    made, told = arena("llama"), []
    made.chosen.exact_limit = 0.0
    made.compete(made.request(2, "loftq"), told.append)
    case = Case.of(told, 2, "loftq")
    assert comparison.demanding(case.quality["objective over exact"], None).ours < 1e-3
    assert len(case.seconds["exact"]) == 2


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


def test_a_difference_below_nothing_has_no_ratio():
    reports = [
        {"contender": "ours", "round": 0, "seconds": 1.0},
        {"contender": "ours without", "round": 0, "seconds": 1.1},
        {"contender": "peft", "round": 0, "seconds": 9.0},
        {"contender": "peft without", "round": 0, "seconds": 1.0},
    ]
    assert comparison.ratio_of(Case.of(reports, 2, "eva"), "peft") is None


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


# -- subjects -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (20, 12), (16, 16)])
def test_a_power_law_weight_is_what_it_says(rows, columns):
    made = PowerLaw(rows, columns, "layer", seed=3)
    weight, k = made.weight(), min(rows, columns)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(values, made.values, rtol=1e-5, atol=1e-7)
    assert float(weight.std()) == pytest.approx(powerlaw.DEVIATION, rel=0.1)
    order = torch.arange(1, k + 1, dtype=torch.float64)
    torch.testing.assert_close(values / values[0], order**-0.7, rtol=1e-4, atol=0)
    for first, last in ((0, 3), (k - 3, k)):
        assert quality.overlap(made.left(first, last), left[:, first:last]) > 1 - 1e-8
        assert quality.overlap(made.right(first, last), right[first:last].T) > 1 - 1e-8
    assert torch.equal(weight, made.weight())
    assert not torch.equal(weight, PowerLaw(rows, columns, "other", seed=3).weight())


@pytest.mark.parametrize("size", [7, 8])
def test_both_cosine_transforms_agree(size):
    block = torch.randn(size, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(powerlaw.by_fft(block), powerlaw.cosine_transform(block))


def test_a_llama_of_power_laws(settings):
    subject = load_subject("llama", settings)
    assert len(subject.known) == 14
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(subject.model.get_submodule(name).weight, subject.known[name].weight())
    counted = sum(parameter.numel() for parameter in subject.model.parameters())
    norms = 5 * TINY.hidden
    assert counted == synthetic.parameters(TINY) + norms


def test_a_model_that_does_not_fit_is_refused(composed):
    settings = resolve(composed("model=llama2_7b_shapes"))
    with pytest.raises(ConfigurationError) as error:
        load_subject("llama2_7b_shapes", settings)
    assert "models.llama2_7b_shapes.llama has 6.5e9 parameters in bfloat16" in str(error.value)
    assert "use device=cuda on a GPU with 28 GiB" in str(error.value)
    assert "models.llama2_7b_shapes.llama.layers=1" in str(error.value)


def test_a_tiny_form_of_the_7b_shapes(composed):
    chosen = "models.llama2_7b_shapes.llama"
    settings = resolve(
        composed(
            "model=llama2_7b_shapes", f"{chosen}.layers=1", f"{chosen}.hidden=32",
            f"{chosen}.intermediate=48", f"{chosen}.heads=4", f"{chosen}.key_value_heads=4",
        )
    )  # fmt: skip
    subject = load_subject("llama2_7b_shapes", settings)
    assert next(subject.model.parameters()).dtype == torch.bfloat16
    settings.models["llama2_7b_shapes"].ranks = [2]
    made, told = Arena(subject, settings, RATES), []
    made.chosen.repetitions = 1
    made.compete(made.request(2, "pissa"), told.append)
    judged = [report for report in told if report.get("contender") == "ours" and "gap" in report]
    assert judged[0]["quality"]["overlap"] > 0.99
    assert judged[0]["gap"] < 0.05


# -- peers, floors, judges ------------------------------------------------------------------------


def given(**changes):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(9, 6, generator=generator) for name in ("a", "b")}
    moment = torch.randn(50, 6, generator=generator)
    moment = moment.T @ moment / 50
    return exact.Given(weights, dict.fromkeys(weights, moment), weights, 2, **changes)


def test_the_straightforward_computations():
    start = given()
    weight, moment = start.weights["a"].double(), start.moments["a"].double()
    basis, triangle = exact.orthogonalized(start)["a"]
    assert (
        quality.difference(
            basis @ triangle, torch.linalg.qr(weight)[0][:, :2] @ (torch.linalg.qr(weight)[1][:2])
        )
        < 1e-6
    )
    for made, matrix in (
        (exact.decomposed(start), weight),
        (exact.decomposed_products(start), weight @ moment),
    ):
        left = torch.linalg.svd(matrix, full_matrices=False)[0]
        assert quality.overlap(made["a"][0], left[:, :2]) > 1 - 1e-9
        assert quality.overlap(made["a"][1], left[:, -2:]) > 1 - 1e-9
    assert exact.decomposed_gradients(start)["a"][0].shape == (9, 4)
    directions = exact.principal(start)
    vectors = torch.linalg.eigh(moment)[1]
    assert quality.overlap(directions["a"], vectors[:, -4:]) > 1 - 1e-9
    assert directions["a"] is directions["b"], "an input that layers share is decomposed once"


def test_alternations_are_loftqs():
    start = given()
    objective = exact.alternated(start)["a"]
    plain = float((start.weights["a"] - exact.Quantizer().roundtrip(start.weights["a"])).norm())
    assert 0 < objective < plain


def test_expected_seconds_follow_the_shapes():
    assert exact.expected("svd", [(10, 100), (100, 10)], RATES) == pytest.approx(2e4 / RATES.svd)
    assert exact.expected("alternation", [(10, 10)], RATES) == pytest.approx(5e3 / RATES.svd)


@pytest.mark.parametrize("method", METHODS)
def test_floors(method):
    one = floors.cost(method, 64, 32, 4)
    assert one.bytes > 0
    two = floors.floor(method, [(64, 32)] * 2, 4, RATES)
    assert two == pytest.approx(2 * one.seconds(RATES))
    assert floors.cost(method, 128, 64, 4).bytes > one.bytes


def test_floors_by_hand():
    assert floors.cost("olora", 10, 20, 2) == floors.Cost(
        bytes=4 * 200 + 4 * 400, float32=2 * 400 + 4 * 10 * 4 + 2 * 400
    )
    assert floors.cost("pissa_niter_4", 10, 20, 2).float32 == (10 + 1) * 2 * 400
    assert floors.cost("bottom", 20, 10, 2).float64 == 2000 + 1000 / 3 + 8 * 2 * 200
    assert floors.Cost(1e10, 1e11, 5e10).seconds(RATES) == 2.0
    assert floors.Cost(3e10, 1e11).seconds(RATES) == 3.0


def test_rates(in_process):
    found = rates.measure_rates(CPU)
    assert min(found.bandwidth, found.float32, found.float64, found.svd) > 0
    assert "GB/s copied" in str(found)


def test_excess_is_that_of_a_known_matrix():
    weight = torch.diag(torch.tensor([5.0, 4.0, 3.0])).double()
    second = torch.zeros(3, 3).double()
    second[1, 1] = 4.0
    found = quality.excess(weight, second, torch.eye(3).double()[:, :1])
    assert found == pytest.approx(34**0.5 / 5 - 1)  # sqrt(5² + 3²) is left, sqrt(4² + 3²) is best


def test_overlap_and_difference():
    axes = torch.eye(4)
    assert quality.overlap(axes[:, :2] @ torch.randn(2, 2), axes[:, :2]) == pytest.approx(1.0)
    assert quality.overlap(axes[:, :2], axes[:, 1:3]) == pytest.approx(0.5)
    assert quality.overlap(axes[:, 2:], axes[:, :2]) == pytest.approx(0.0)
    assert quality.difference(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1


def test_references_of_a_model_that_is_not_synthetic(arena):
    made = arena("decoder")
    made.provisions.calibrate(made.request(2, "corda_kpm"))
    truths = made.provisions.references
    name = truths.judged[0]
    left = torch.linalg.svd(truths.weight(name), full_matrices=False)[0]
    assert quality.overlap(truths.of_weight(name).last, left[:, -2:]) > 1 - 1e-9
    product = truths.weight(name) @ truths.second_moment(name, lifted=False)
    left = torch.linalg.svd(product, full_matrices=False)[0]
    assert quality.overlap(truths.of_product(name, lifted=False).first, left[:, :2]) > 1 - 1e-9
    assert truths.directions(name).shape[1] == 4
    assert truths.directions(name) is truths.directions(name)


def test_what_is_too_dear_has_no_reference(arena, monkeypatch):
    monkeypatch.setattr(references, "TOO_DEAR", 1)
    made = arena("decoder")
    made.provisions.calibrate(made.request(2, "eva"))
    truths = made.provisions.references
    name = truths.judged[0]
    assert truths.of_weight(name) is None
    assert truths.of_product(name, lifted=True) is None
    assert truths.directions(name) is None
    layer = LayerFactors(torch.zeros(2, 32), torch.zeros(32, 2), 1.0, torch.zeros(32, 32))
    for measures in judging.MEASURES.values():
        for figure, measure in measures.items():
            if figure != "difference":
                assert measure(name, layer, truths, {}) is None


def test_judged_layers_are_spread():
    targets = [
        references.Target(f"{kind}.{i}", "Linear", shape, "float32", 2, 2.0, 1.0)
        for i in range(30)
        for kind, shape in (("small", (4, 4)), ("large", (4096, 4096)))
    ]
    small = [f"small.{i}" for i in (0, 6, 12, 17, 23, 29)]
    assert references.spread(targets) == [*small, "large.0"]


def test_the_lift_is_cordas():
    from lora_init.initializers import corda

    assert references.CORDA_LIFT == corda.NULL_SPACE_LIFT


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


# -- report ---------------------------------------------------------------------------------------


def test_tables():
    assert markdown_table(ROWS[:2]).splitlines() == [
        "| model | case | ours | PEFT | ratio PEFT / ours | target | loss difference | note |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: | :--- |",
        "| minilm | LoRA | 200 ms | 300 ms | 1.50 [1.40, 1.60] | ≥ 0.97: met | 2.0e-07 |  |",
        "| minilm | DoRA | – | – | – | – | – | skipped: not served |",
    ]
    assert "| 7.5 MiB | 10.0 MiB | 1.33 | met | 9.3 MiB |" in markdown_table(ROWS[2:3])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(terminal_table(ROWS[:2]))
    told = console.export_text()
    assert "1.50 [1.40, 1.60]" in told
    assert "minilm DoRA: skipped: not served" in told


def test_a_narrow_terminal_gets_whole_cells_of_fewer_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(ROWS[3:], {}, width=80))
    told = console.export_text()
    line = next(line for line in told.splitlines() if "pissa" in line)
    assert [text in line for text in ("500 ms", "10.00 s", "20", "≥ 15: met")] == [True] * 4
    assert "excess" not in told
    assert "no room here for quality, torch.linalg: see table.md" in told
    assert "no room" not in str(terminal_table(ROWS[3:], {}).renderables[-1])


def test_the_initialization_table():
    table = markdown_table(ROWS[3:], initialization.EXTRA)
    first, eva, share = table.splitlines()[2:]
    assert "| 500 ms | 10.00 s | 9.00 s | 20 | ≥ 15: met |" in first
    assert "| excess 2.0e-05 ≤ 1.0e-04 (PEFT 0.0e+00) |" in first
    assert "| 0.80 [0.70, 0.90] (torch.linalg) |" in eva
    assert "| 0.20× | – | – | – | ≤ 0.3: met |" in share
    assert "ratio peer / ours" in columns(ROWS[3:], {})
    assert "floors" not in columns(ROWS[3:], {})


def test_overall_verdicts():
    assert overall([None, "met", "open"]) == "open"
    assert overall(["met", "missed", "open"]) == "missed"
    assert overall([None, None]) is None
    assert verdict_below(Interval(1.0, 0.9, 1.1), 1.2) == "met"
    assert verdict_below(Interval(1.0, 0.9, 1.1), 1.0) == "open"
    assert verdict_below(Interval(1.0, 0.9, 1.1), 0.8) == "missed"
    assert verdict_below(None, 1.0) is None
    assert Quality(0.9, limit=0.999, least=True).kept is False
    assert Quality(None, limit=1.0).kept is None


def test_report(settings):
    ledger = Ledger(settings)
    output = ledger.output
    for row in ROWS:
        ledger.hear(row)
    ledger.finish()
    result = json.loads((output / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["rows"][0]["ratio"] == {"estimate": 1.5, "low": 1.4, "high": 1.6}
    assert result["environment"]["packages"]["peft"]
    assert "**memory**: peak memory" in (output / "table.md").read_text()
    assert (output / "ratios.svg").read_text().startswith("<svg")
    assert len((output / "ratios.png").read_bytes()) > 8000
    page = (output / "ratios.html").read_text()
    assert 'src="http' not in page
    assert "steps · minilm · LoRA" in page
    page = (output / "initialization.html").read_text()
    assert "square (synthetic), r 16" in page
    assert len((output / "initialization.png").read_bytes()) > 8000
    assert charts(ROWS[1:2]) == {}


def test_what_is_broken_off_leaves_its_rows(settings, monkeypatch):
    """Tables, charts and rows of what was measured; no result, which says that all is there."""
    calls = []

    def run(settings, hear, clock):
        calls.append(clock.seconds)
        for row in ROWS:
            hear(row)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ROWS

    settings.sections, settings.seconds = ["memory"], 60.0
    monkeypatch.setattr(memory, "run", run)
    output = benchmark(settings)
    assert (output / "result.json").exists()
    assert not (output / "unfinished.json").exists()
    (output / "initialization.svg").unlink()
    with pytest.raises(KeyboardInterrupt):
        benchmark(settings)
    assert calls == [60.0, 60.0]
    assert not (output / "result.json").exists()
    left = json.loads((output / "unfinished.json").read_text())
    assert left["status"] == "unfinished"
    assert [row["case"] for row in left["rows"]] == [row.case for row in ROWS]
    assert (output / "table.md").read_text().startswith("**Unfinished**")
    assert (output / "initialization.svg").exists()


def test_the_summary_fits_a_readme():
    more = [
        Row(
            "initialization", "minilm, r 8", "pissa", "s", ours=0.5, peft=0.6,
            ratio=Interval(1.2, 1.1, 1.3), target=4, verdict="missed",
            quality={"excess": Quality(3e-4, 0.0, 1e-4)},
        ),
        Row(
            "initialization", "minilm, r 8", "loftq", "s", ours=0.5, note="PEFT: fails",
            quality={"overlap": Quality(0.9995, None, 0.999, least=True)},
        ),
    ]  # fmt: skip
    lines = summary.summary([*ROWS, *more], "a machine").splitlines()
    assert lines[0] == "| strategy | square, r 16 | minilm, r 8 | quality |"
    assert lines[2] == "| pissa | 20 (≥ 15) | **1.20** (≥ 4) | **excess 3.0e-04** (≤ 1.0e-04) |"
    assert lines[3] == "| eva | 0.80ᵗ | – | – |"
    assert lines[4] == "| eva / plain passes | 0.20× (≤ 0.3) | – | – |"
    assert lines[5] == "| loftq | – | 500 ms | overlap 0.9995 (≥ 0.999) |"
    assert "| steps: LoRA | minilm | 200 ms | 300 ms | 1.50 (≥ 0.97) | met |" in lines
    assert lines[-1].endswith("Measured on a machine.")
    assert len(lines) <= 40


def test_a_row_in_a_line():
    told = " ".join(commentary.line(ROWS[3]).split())
    assert told == (
        "pissa ours 500 ms, PEFT 10.00 s, torch.linalg 9.00 s; PEFT / ours 20; ≥ 15: met; "
        "excess 2.0e-05 ≤ 1.0e-04 (PEFT 0.0e+00)"
    )


def test_what_is_at_hand_is_shown_on_a_terminal(monkeypatch):
    console = Console(width=120, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(ticker.rich, "get_console", lambda: console)
    with ticker.Ticker("loading", Clock(125.0)) as shown:
        shown.total(14)
        shown.show("square: r 16 pissa, PEFT, turn 2")
        shown.advance()
    told = console.file.getvalue()
    assert "square: r 16 pissa, PEFT, turn 2" in told
    assert "1/14" in told
    assert "at most 2:0" in told
    assert ticker.time_left(Clock()) == ""


def test_a_folder_a_machine(settings):
    known = environment(settings) | {"gpu": "NVIDIA X 1", "device": "cuda"}
    assert machine(known) == "nvidia-x-1"
    assert machine(known | {"device": "cpu", "threads": 3}).endswith("3-threads")
