"""The benchmark in small: arithmetic on known numbers, and every section on tiny models.

No time is asserted: a test machine has neighbours.
"""

import io
import itertools
import json

import pytest
import torch
from rich.console import Console

from experiments.benchmark import (
    contenders,
    initialization,
    injection,
    isolated,
    memory,
    quality,
    steps,
)
from experiments.benchmark.chart import ratio_chart
from experiments.benchmark.contenders import LayerFactors
from experiments.benchmark.ratios import paired_ratio
from experiments.benchmark.report import environment, folder, machine, write_report
from experiments.benchmark.rows import Row, verdict
from experiments.benchmark.settings import (
    BenchmarkConfig,
    InitializationSettings,
    InjectionSettings,
    MemorySettings,
    ModelSettings,
    StepsSettings,
    from_plain,
    register_schema,
    resolve,
    to_plain,
)
from experiments.benchmark.subjects import load_subject
from experiments.benchmark.tables import markdown_table, terminal_table
from experiments.benchmark.timing import Contender, order, take_turns
from experiments.errors import ConfigurationError, RunFailed
from experiments.report.statistics import Interval

register_schema()
CPU = torch.device("cpu")

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
]  # fmt: skip


@pytest.fixture
def settings(tiny_encoder, tiny_decoder, tmp_path):
    """All sections on two tiny models."""
    return BenchmarkConfig(
        models={
            "encoder": ModelSettings(str(tiny_encoder), "SEQ_CLS", 2, 8, {"lora": 0.97}),
            "decoder": ModelSettings(str(tiny_decoder), "CAUSAL_LM", 2, 8),
        },
        steps=StepsSettings(["encoder", "decoder"], rounds=3, warmup=1, learning_rate=1e-2),
        injection=InjectionSettings(["encoder", "decoder"], repetitions=2),
        memory=MemorySettings(["encoder"], ["pissa"]),
        initialization=InitializationSettings(["encoder"], ["loftq"], repetitions=1),
        rank=2,
        alpha=4,
        threads=1,
        outputs=str(tmp_path),
    )


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
    settings = resolve(composed(config="benchmark"))
    assert settings.sections == ["steps", "injection", "memory", "initialization"]
    assert settings.models["smollm2"].targets == {"lora": 0.97, "dora": 1.2}
    assert from_plain(json.loads(json.dumps(to_plain(settings)))) == settings


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sections=[stepz]", "sections: 'stepz'; did you mean 'steps'? allowed are steps"),
        ("steps.models=[bert]", "steps.models: 'bert'; allowed are minilm, smollm2, local"),
        ("steps.rounds=1", "steps.rounds=1; allowed is 2 or more"),
        ("memory.methods=[pisa]", "did you mean 'pissa'?"),
        ("device=mps", "device: 'mps'; allowed are cpu, cuda"),
        ("threads=0", "threads=0; allowed is 1 or more"),
        ("steps.models=[local]", "models.local.source is not set, but steps.models has"),
    ],
)
def test_bad_settings(composed, override, told):
    with pytest.raises(ConfigurationError) as error:
        resolve(composed(override, config="benchmark"))
    assert told in str(error.value)


# -- sections -------------------------------------------------------------------------------------


def test_batches_have_the_asked_shape(settings):
    for name in settings.models:
        subject = load_subject(name, settings)
        batches = subject.training_batches(3)
        assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 8)] * 3
        assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
        calibration = subject.calibration_batches(5, 2)
        assert [len(batch["input_ids"]) for batch in calibration] == [2, 2, 1]
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
    watch = memory.HostPeak()
    block = torch.ones(30 * memory.MIB // 4)
    del block
    if not watch.note:
        assert 28 <= watch.rise() / memory.MIB <= 60


def test_initialization(settings):
    (row,) = initialization.run(settings)
    assert row.case == "loftq"
    assert row.ours > 0
    assert row.figures["output gap, ours"] > 1e-4, "its base is quantised"
    if not torch.cuda.is_available():
        assert row.peft is None
        assert row.note.startswith("PEFT fails: ")


def test_quality_of_pissa(settings):
    """What the process of one method reports, without the process."""
    settings.initialization.repetitions = 2
    told = []
    initialization.measure(settings, told.append, "encoder", "pissa")
    turns = [report for report in told if "seconds" in report]
    assert [(turn["contender"], turn["round"]) for turn in turns] == [
        ("ours", 0), ("peft", 0), ("peft", 1), ("ours", 1),
    ]  # fmt: skip
    for turn in turns[:2]:
        assert 0 <= turn["figures"]["output gap"] < 1e-4
        assert -1e-6 <= turn["figures"]["excess error"] < 1e-4


def test_excess_is_that_of_a_known_matrix():
    weight = torch.diag(torch.tensor([5.0, 4.0, 3.0]))
    optimum = quality.optimal_errors({"layer": weight}, rank=1)
    assert optimum["layer"] == pytest.approx(5.0)  # sqrt(4² + 3²)
    second = LayerFactors(torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[0.0], [1.0], [0.0]]), 2.0)
    excess = quality.worst_excess({"layer": weight}, {"layer": second}, optimum)
    assert excess == pytest.approx(34**0.5 / 5 - 1)  # sqrt(5² + 3²) is left


def test_what_does_not_end_is_said(settings):
    settings.initialization.time_limit = 0.5
    row = initialization.compare("encoder", "pissa", settings)
    assert row.ours is None
    assert row.note == "ours: no end within 0.5 s"


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
    assert "| 7.5 MiB | 10.0 MiB | 1.33 | met | 9.3 MiB |" in markdown_table(ROWS[2:])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(terminal_table(ROWS[:2]))
    told = console.export_text()
    assert "1.50 [1.40, 1.60]" in told
    assert "minilm DoRA: skipped: not served" in told


def test_report(settings):
    output = folder(settings)
    write_report(settings, ROWS, output)
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
    assert ratio_chart(ROWS[1:2], "nothing") is None


def test_a_folder_a_machine(settings):
    known = environment(settings) | {"gpu": "NVIDIA X 1", "device": "cuda"}
    assert machine(known) == "nvidia-x-1"
    assert machine(known | {"device": "cpu", "threads": 3}).endswith("3-threads")
