"""Multiruns from the command line: manifests, failures, a third party's method, brief errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import joblib
import pytest
from joblib.externals.loky import get_reusable_executor

from lora_init import list_initializers

ROOT = Path(__file__).resolve().parents[2]


IN_TURN = """
import json, sys
from hydra.core.global_hydra import GlobalHydra
from experiments import train
from lora_init import list_initializers

print(*(method.name for method in list_initializers()))
for arguments in json.load(sys.stdin):
    GlobalHydra.instance().clear()
    sys.argv[1:] = arguments
    train.main()
    print("done", file=sys.stderr)
"""


def command_lines(*lines: list[str], path: Path, **more):
    """Command lines of experiments.train, one after another in one new process."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(path)]),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", IN_TURN], input=json.dumps(lines), capture_output=True, text=True,
        timeout=240, env=environment, **more,
    )  # fmt: skip


def manifest(outputs: Path, sweep: str = "default") -> dict:
    return json.loads((outputs / "sweeps" / sweep / "manifest.json").read_text())


@pytest.mark.slow
def test_a_multirun_keeps_its_own_list(command, tiny, tmp_path, monkeypatch):
    outputs = tmp_path / "outputs"
    monkeypatch.chdir(tmp_path)
    status, printed, told = command("-m", *tiny, "init=kaiming,pissa", "seed=1")
    assert status == 0, told
    headers = [line for line in printed.splitlines() if line.startswith("run ")]
    assert headers == ["run 1/2 kaiming seed 1", "run 2/2 pissa seed 1"]
    listed = manifest(outputs)
    assert (listed["sweep"], listed["status"], listed["total"]) == ("default", "finished", 2)
    assert [run["status"] for run in listed["runs"]] == ["finished"] * 2
    assert "init=pissa" in listed["runs"][1]["overrides"]
    for run in listed["runs"]:
        result = json.loads((Path(run["folder"]) / "result.json").read_text())
        assert result["run_id"] == run["run_id"]
        assert (result["config"]["sweep"], result["folder"]) == ("default", run["folder"])
    # Nothing is written elsewhere, by Hydra or by us.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs"]
    assert sorted(path.name for path in outputs.iterdir()) == ["runs", "sweeps"]

    # The next sweep lists its own runs only, finds the finished one, and survives a failure.
    status, printed, told = command("-m", *tiny, "init=orthogonal,kaiming", "lora.r=4,3", "seed=1")
    assert status == 1
    listed = manifest(outputs)
    assert listed["status"] == "incomplete"
    assert [run["status"] for run in listed["runs"]] == [
        "finished", "finished", "failed", "finished",
    ]  # fmt: skip
    assert "finished before, skipped" in printed
    assert "failed (configuration): init=orthogonal" in printed
    failed = listed["runs"][2]
    assert told == f"1 of 4 runs failed: {Path(failed['folder']).name} (configuration)"
    assert (outputs / "sweeps" / "default" / "multirun.yaml").exists()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_parallel_jobs_share_one_list(command, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        status, _, told = command(
            "-m", *tiny, "init=kaiming,eva", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"
        )
    finally:
        get_reusable_executor().shutdown(wait=True)
    assert status == 0, told
    listed = manifest(tmp_path / "outputs")
    assert listed["status"] == "finished"
    assert [Path(run["folder"]).name.split("-")[0] for run in listed["runs"]] == ["kaiming", "eva"]
    # Two at a time share the cores out: no core is asked for twice.
    paths = [Path(run["folder"]) / "result.json" for run in listed["runs"]]
    shares = {json.loads(path.read_text())["environment"]["threads"] for path in paths}
    assert shares == {max(joblib.cpu_count() // 2, 1)}


SAMPLE = """
from dataclasses import dataclass

import torch

from lora_init import Factors, Options, register_initializer


@dataclass
class SampleOptions(Options):
    size: float = 0.01


@register_initializer("sample", options=SampleOptions, paper="none")
def sample(layer, options):
    rows, columns = layer.shape
    lora_A = options.size * torch.randn(layer.rank, columns, generator=layer.generator)
    return Factors(lora_A, torch.zeros(rows, layer.rank))
"""


@pytest.fixture
def sample_package(tmp_path) -> Path:
    """A folder as pip would leave it: a package with a preset, and its entry point."""
    site = tmp_path / "site"
    conf = site / "sample_pkg" / "conf" / "init"
    conf.mkdir(parents=True)
    (site / "sample_pkg" / "__init__.py").write_text(SAMPLE)
    (site / "sample_pkg" / "conf" / "__init__.py").touch()
    (conf / "large.yaml").write_text("defaults: [schema/sample@_here_, _self_]\nsize: 0.5\n")
    info = site / "sample_pkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sample-pkg\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lora_init.initializers]\nsample = sample_pkg\n")
    return site


def own_lines(messages: str) -> list[str]:
    """The lines of a standard error, without those of torchao, which transformers imports."""
    return [line for line in messages.splitlines() if not re.search("torchao|_pytree", line)]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_third_partys_method_is_listed_and_swept(tiny, tmp_path, sample_package):
    # All that the pattern finds but our own, of which one is enough here.
    ours = ",".join(sorted({method.name for method in list_initializers()} - {"kaiming"}))
    sweep = ["-m", *tiny, f"init=glob(*,exclude=[{ours}])"]
    preset = [*tiny, "init=large", "hydra.searchpath=[pkg://sample_pkg.conf]", "seed=1"]
    mistake = [*tiny, "init=sample", "init.siez=1"]
    done = command_lines(sweep, preset, mistake, path=sample_package, cwd=tmp_path)
    of_the_sweep, of_the_preset, of_the_mistake = done.stderr.split("done\n")
    assert own_lines(of_the_sweep) == own_lines(of_the_preset) == []
    assert "sample" in done.stdout.splitlines()[0].split()
    runs = manifest(tmp_path / "outputs")["runs"]
    swept = {Path(run["folder"]).name.split("-")[0]: run for run in runs}
    assert set(swept) == {"kaiming", "sample"}
    result = json.loads((Path(swept["sample"]["folder"]) / "result.json").read_text())
    assert result["init"] == {"name": "sample", "size": 0.01}
    (large,) = (tmp_path / "outputs" / "runs").glob("sample-*-s1-*/result.json")
    assert json.loads(large.read_text())["init"] == {"name": "sample", "size": 0.5}

    assert done.returncode == 1
    assert "siez" in of_the_mistake


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init=pisa"], "Could not find 'init/pisa'"),
        (["init=pissa", "init.nitr=2"], "nitr"),
        (["model=local", "model.path=/nowhere"], "model.path='/nowhere': no such folder"),
        (["data=table"], "data.path is not set"),
    ],
)
def test_a_mistake_ends_with_one_message(command, tmp_path, overrides, message):
    status, _, told = command(*overrides, f"paths.outputs={tmp_path}/outputs")
    assert status == 1
    assert message in told
    assert "Traceback" not in told
    assert len(told.splitlines()) < 10 + len(list_initializers())  # the options are listed
    assert not (tmp_path / "outputs" / "runs").exists()
