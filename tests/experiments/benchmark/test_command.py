"""The command: its settings, its time limit, and the files that it leaves."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from experiments.benchmark import __main__ as command
from experiments.benchmark import ledger, memory
from experiments.benchmark.__main__ import benchmark
from experiments.benchmark.row import Case, Row
from experiments.benchmark.schema import resolve
from experiments.benchmark.workload import load_workload
from experiments.errors import ConfigurationError


@pytest.fixture
def counted(settings, monkeypatch):
    """Two cases that only count their calls, in place of the section `steps`."""
    calls = []

    def measure(name):
        calls.append(name)
        yield Row("steps", "tiny", name, ours=1.0)

    monkeypatch.setitem(
        command.CASES,
        "steps",
        lambda _: [Case("steps", "tiny", name, lambda n=name: measure(n)) for name in "ab"],
    )
    settings.sections = ["steps"]
    return calls


def test_a_run_writes_page_and_picture(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "in_fresh_process", memory.peaks_of)
    settings.page = str(tmp_path / "docs" / "performance.md")
    folder = benchmark(settings)
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert page == (folder / "performance.md").read_text()
    for title in ("Initialization", "Calibration", "Memory", "Training steps", "Experts"):
        assert f"## {title}" in page
    assert "torch " in page
    assert "| pissa | " in page
    assert (tmp_path / "docs" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert {path.suffix for path in folder.glob("benchmark.*")} == {".png", ".svg", ".html"}
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    assert {row["section"] for row in result["rows"]} == set(settings.sections)
    assert "initialization llama r=2 pissa: " in capsys.readouterr().out


def test_nothing_starts_after_the_time_limit(settings, counted, monkeypatch):
    settings.seconds = 10
    clock = iter([0.0, 9.0, 11.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(command, "Progress", Silent)
    result = json.loads((benchmark(settings) / "result.json").read_text())
    assert counted == ["a"]
    assert [row["note"] for row in result["rows"]] == ["", "not measured: seconds=10 were over"]


class Silent:
    """A progress bar without a clock."""

    def __init__(self, *columns, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def add_task(self, *given, **options):
        return 0

    advance = update = add_task


def test_an_interrupted_run_keeps_its_rows(settings, counted, tmp_path, monkeypatch):
    settings.page = str(tmp_path / "performance.md")
    cases = command.CASES["steps"](None)

    def interrupted():
        raise KeyboardInterrupt

    cases.append(Case("steps", "tiny", "c", interrupted))
    monkeypatch.setitem(command.CASES, "steps", lambda _: cases)
    with pytest.raises(KeyboardInterrupt):
        benchmark(settings)
    folder = tmp_path / "benchmark" / ledger.machine(ledger.environment(settings))
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], len(result["rows"])) == ("unfinished", 2)
    assert "did not finish" in (folder / "performance.md").read_text()
    assert not (tmp_path / "performance.md").exists()


@pytest.mark.parametrize("model", ["all", "minilm", "smollm2", "llama_47m", "llama2_7b_shapes"])
def test_the_models_of_the_configuration_compose(composed, model):
    settings = resolve(composed(f"model={model}"))
    named = {name for section in settings.sections for name in getattr(settings, section).models}
    assert model == "all" or named == {model}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sections=[stepz]", "sections='stepz' is not supported: must be one of"),
        ("models.minilm.task=SEQ", "models.*.task='SEQ' is not supported"),
        ("models.minilm.ranks=[0]", "models.*.ranks=0 is not supported: must be an integer >= 1"),
        ("models.minilm.peers=[pizza]", "did you mean 'pissa'"),
        ("models.llama_47m.source=x", "models.*.source and models.*.llama are not supported"),
        ("models.llama_47m.llama.dtype=int8", "must be one of float32, bfloat16, float16"),
        ("initialization.methods=[pizza]", "*.methods='pizza' is not supported"),
        ("steps.models=[llama_47m]", "steps.models='llama_47m' is not supported: must be a model"),
        ("steps.models=[minilm,tiny]", "steps.models='tiny' is not supported"),
        ("steps.models=[local]", "models.local.source=None is not supported"),
        ("alpha=0", "alpha=0.0 is not supported: must be a finite number > 0"),
        ("seconds=0", "seconds=0.0 is not supported: must be a finite number >= 1"),
        ("device=gpu", "device='gpu' is not supported"),
        ("rounds=3", "rounds is not a setting"),
    ],
)
def test_a_wrong_setting_is_named(default, override, message):
    changed = OmegaConf.merge(default, OmegaConf.from_dotlist([override]))
    with pytest.raises(ConfigurationError) as error:
        resolve(changed)
    assert message in str(error.value)


def test_a_model_that_does_not_fit_is_refused(composed):
    settings = resolve(composed("model=llama2_7b_shapes"))
    with pytest.raises(ConfigurationError) as error:
        load_workload("llama2_7b_shapes", settings)
    assert "models.llama2_7b_shapes.llama with 6.5e9 parameters in bfloat16" in str(error.value)
    assert "device=cuda on a GPU with 28 GiB" in str(error.value)
    assert "models.llama2_7b_shapes.llama.layers=1" in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_the_shapes_of_a_large_llama_in_small(composed, tmp_path):
    chosen = "models.llama2_7b_shapes.llama"
    sizes = {"layers": 1, "hidden": 32, "intermediate": 48, "heads": 4, "key_value_heads": 4}
    settings = resolve(
        composed(
            "model=llama2_7b_shapes", f"outputs={tmp_path}", "sections=[initialization]",
            "initialization.methods=[pissa]", "models.llama2_7b_shapes.ranks=[2]",
            *(f"{chosen}.{name}={size}" for name, size in sizes.items()),
        )
    )  # fmt: skip
    workload = load_workload("llama2_7b_shapes", settings)
    assert next(workload.model.parameters()).dtype == torch.bfloat16
    (row,) = json.loads((benchmark(settings) / "result.json").read_text())["rows"]
    assert row["error"] < 0.01
