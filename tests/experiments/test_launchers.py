"""Every launcher, by override only; and one run on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import joblib
import pytest
import yaml

from experiments import launching
from experiments.execution import execute
from experiments.runs import identify

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str, cwd: Path, module=("experiments.train",), **environment: str):
    """A command line in a process of its own, which chooses its threads itself."""
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", *module, *arguments], cwd=cwd, capture_output=True, text=True,
        timeout=240,
        env={**inherited, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def results(outputs: Path) -> list[dict]:
    sweep = outputs / "sweeps" / "default" / "manifest.json"
    listed = json.loads(sweep.read_text())
    assert listed["status"] == "finished"
    return [json.loads((Path(r["folder"]) / "result.json").read_text()) for r in listed["runs"]]


def test_the_machine_is_shared_out(monkeypatch):
    for cores, jobs, threads in ((1, 2, 1), (2, 2, 1), (4, 2, 2), (16, 4, 4), (64, 16, 4)):
        monkeypatch.setattr(launching, "cores", lambda cores=cores: cores)
        assert (launching.jobs_at_once(), launching.threads_at_once()) == (jobs, threads)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm", "ray"])
def test_presets_keep_what_the_plugin_offers(launcher):
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    found = ConfigStore.instance().list("hydra/launcher")
    if f"{launcher}.yaml" not in found:
        pytest.skip(f"the plugin of hydra/launcher={launcher} is not installed")
    node = ConfigStore.instance().load(f"hydra/launcher/{launcher}.yaml").node
    settings = OmegaConf.to_container(node, resolve=False)
    assert settings["_target_"].startswith("hydra_plugins.")
    assert set(launching.PRESETS.get(launcher, {})) <= set(settings)
    if launcher == "submitit_slurm":
        assert settings["max_num_timeout"] == 10
        assert "additional_parameters" in settings


@pytest.mark.slow
def test_joblib_shares_the_cores_out(tiny, tmp_path):
    command("-m", *tiny, "init=kaiming,olora", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
            cwd=tmp_path)  # fmt: skip
    threads = [result["environment"]["threads"] for result in results(tmp_path / "outputs")]
    assert threads == [max(joblib.cpu_count() // 2, 1)] * 2


@pytest.mark.slow
def test_submitit(tiny, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command("-m", *tiny, "init=kaiming,olora", "hydra/launcher=submitit_local", cwd=tmp_path,
            OMP_NUM_THREADS="1")  # fmt: skip
    assert [r["method"] for r in results(tmp_path / "outputs")] == ["kaiming", "olora"]


@pytest.mark.slow
def test_a_local_ray_cluster(tiny, tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    done = command(
        "-m", *tiny, "init=kaiming,olora", "hydra/launcher=ray",
        "hydra.launcher.ray.remote.num_gpus=0", "+hydra.launcher.ray.init.num_cpus=2",
        "hydra.launcher.ray.remote.num_cpus=1",
        cwd=tmp_path, RAY_USAGE_STATS_ENABLED="0",
    )  # fmt: skip
    found = results(tmp_path / "outputs")
    assert [result["method"] for result in found] == ["kaiming", "olora"]
    assert [result["environment"]["threads"] for result in found] == [1, 1]
    assert "run 2/2 olora" in done.stdout + done.stderr


@pytest.mark.slow
def test_optuna_looks_for_a_rate_and_takes_up_its_trials(tiny, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ("--config-name", "sweep_optuna", *tiny, "training.validate_every=2",
              "hydra.sweeper.n_trials=2")  # fmt: skip
    command(*search, cwd=tmp_path)
    outputs = tmp_path / "outputs"
    best = yaml.safe_load(
        (outputs / "sweeps" / "optuna-kaiming" / "optimization_results.yaml").read_text()
    )
    trials = [json.loads(path.read_text()) for path in outputs.glob("runs/*/result.json")]
    assert len(trials) == 2
    assert best["best_value"] == max(trial["validation_score"] for trial in trials)
    assert all(1e-5 <= trial["learning_rate"] <= 1e-2 for trial in trials)
    for trial in trials:
        assert trial["validation"]["accuracy"] == trial["validation_score"]
    more = command(*search[:-1], "hydra.sweeper.n_trials=3", cwd=tmp_path)
    assert more.stdout.count("finished before, skipped") == 2


@pytest.mark.slow
def test_two_processes_train_one_run(configured, tiny, tmp_path):
    """`accelerate launch`: the losses of one process, in one folder, and one result."""
    settings = [*tiny, "training.steps=6", "training.validate_every=3", "init=pissa"]
    done = command(
        "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "0", "-m", "experiments.train", *settings,
        "runtime.checkpoint_every=2",
        module=("accelerate.commands.launch",), cwd=tmp_path, OMP_NUM_THREADS="1",
    )  # fmt: skip
    both = identify(configured(*settings))
    assert done.stdout.count("training ") == 1
    assert sorted(p.name for p in both.path.parent.iterdir()) == [both.path.name]
    alone = configured(*settings, f"paths.outputs={tmp_path}/alone")
    expected = execute(alone)
    result = both.finished()

    def rows(folder):
        return [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]

    mine, theirs = rows(both), rows(identify(alone))
    assert [(r["split"], r["step"]) for r in mine] == [(r["split"], r["step"]) for r in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert result["n_test"] == expected["n_test"]
    assert result["test"]["loss"] == pytest.approx(expected["test"]["loss"], rel=1e-5)
