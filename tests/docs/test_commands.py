"""The training, reporting and measuring commands of README and documentation, run in a small form.

`test_pages` checks in every test run that each of them exists and composes. Here they run from end
to end, with `make test-all`.
"""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from substitutes import random_llama, write_word_problems
from test_pages import MINILM, ROOT, blocks

from experiments.report import output
from experiments.report.gallery import make_canvas

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
IN_PROCESS = "hydra.launcher.n_jobs=1"
# A recipe with a Llama of two layers instead of the large one.
RECIPE = ["lora.r=4", "training.max_length=48", "training.max_new_tokens=2"]
MODULE = "python -m experiments."
PAGES = ("docs/guides/own_model_and_data.md", "docs/guides/fair_protocol.md", "docs/recipes.md",
         "docs/reproductions.md")  # fmt: skip


def sequences():
    """Keep the commands of a block together: a report needs the sweep above it."""
    for block in blocks():
        lines = block.code.splitlines()
        if block.page in PAGES and block.language == "bash" and lines[0].startswith(MODULE):
            yield pytest.param(lines, id=f"{block.page}-{lines[0][len(MODULE) :][:50]}")


def reduced(command, outputs):
    """The command as the page has it, with overrides that make it small."""
    if command.startswith(f"{MODULE}papers "):
        return f"{command.replace('outputs/', f'{outputs}/')} form=smoke output={outputs}/papers"
    if command.startswith(f"{MODULE}papers."):
        # Other settings have another folder, so that the first command's results stay.
        small = command.replace("--config-name full", "").replace("device=cuda", "steps=2")
        module, _, overrides = small.partition("rank_scaling")
        folder = outputs / ("others" if overrides else "papers")
        return f"{module}rank_scaling --config-name smoke {overrides} output={folder}"
    if not command.startswith(f"{MODULE}train"):
        return command.replace("outputs/", f"{outputs}/")
    if "--config-name sweep_protocol" in command:
        command += "".join(f" hydra.sweeper.{word}" for word in PROTOCOL) + f" {IN_PROCESS}"
    command = command.replace("model=smollm2", "model=local model.path=$LLAMA2 model.name=tiny")
    command = command.replace("'init=glob(*)'", "init=kaiming,eva").replace("seed=0,1", "seed=0")
    overrides = [*SMALL, f"paths.outputs={outputs}"]
    if "causal" in command:
        overrides += CAUSAL
    elif "data=table" not in command:
        overrides += SENTENCES
    if "experiment=" in command:
        overrides += [*RECIPE, "init=pissa"]
        command = command.replace(
            " init=pissa,olora,eva", " model.path=$LLAMA2 data.path=$METAMATH"
        )
    if "sweep_causal" in command:
        overrides += ["model=local", "model.path=$LLAMA2", "model.name=tiny"]
        overrides += ["init=kaiming", "seed=0", "training.learning_rate=1e-3"]
    return " ".join([command, *overrides])


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Run a command in the repository, in this process where it is Python's; return its output."""
    interpreter = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", f"{interpreter}:{os.environ['PATH']}")
    monkeypatch.setenv("MODEL", str(MINILM))
    monkeypatch.setenv("LLAMA2", str(random_llama(tmp_path / "llama", width=64)))
    monkeypatch.setenv("METAMATH", str(write_word_problems(tmp_path)))
    monkeypatch.chdir(ROOT)

    def in_process(command):
        _, _, module, *arguments = shlex.split(os.path.expandvars(command))
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        GlobalHydra.instance().clear()
        try:
            with warnings.catch_warnings():
                # Another test may have imported the module by its name.
                warnings.simplefilter("ignore", RuntimeWarning)
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return end.code or 0
        return 0

    def carry_out(command):
        capfd.readouterr()
        if command.startswith(MODULE):
            status = in_process(command)
        else:
            status = subprocess.run(["bash", "-c", command], timeout=900).returncode
        printed = capfd.readouterr()
        assert status == 0, f"{command}\n{printed.out[-3000:]}\n{printed.err[-3000:]}"
        return printed.out

    return carry_out


@pytest.mark.exhaustive
@pytest.mark.slow
def test_make_compare_works(run, tmp_path):
    """With two methods, one seed and two steps, and with the real report."""
    overrides = [*SMALL, *SENTENCES, "init=kaiming,olora", "seed=0", IN_PROCESS]
    outputs = f"OUTPUTS={tmp_path} OVERRIDES={shlex.quote(' '.join(overrides))}"
    printed = run(f"make compare {outputs}")
    assert "index.html" in printed.replace("\n", "")
    assert list(tmp_path.glob("runs/*/result.json"))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("lines", list(sequences()))
def test_commands_work(lines, run, tmp_path, monkeypatch):
    # `make compare` draws the charts, in other processes.
    monkeypatch.setattr(
        output, "draw", lambda summarizer, views, majority, metric, _: (
            [], make_canvas(summarizer, views, metric)
        ),
    )  # fmt: skip
    for command in lines:
        printed = run(reduced(command, tmp_path))
        if "report" in command:
            assert "index.html" in printed.replace("\n", "")
        if "train" in command:
            assert list(tmp_path.glob("runs/*/result.json"))
