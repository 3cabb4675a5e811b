"""Every launcher, by override only; and one run on two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments.config import launchers as launching
from experiments.run.execute import execute
from experiments.run.folder import identify

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def in_processes(monkeypatch, tmp_path):
    """What the processes that a launcher starts inherit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return monkeypatch


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


def test_a_ray_cluster_that_is_there_is_joined_with_its_own_store():
    from hydra.core.config_store import ConfigStore

    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    node = ConfigStore.instance().load("hydra/launcher/ray.yaml").node.copy()
    assert node.ray.init.object_store_memory == launching.OBJECT_STORE_BYTES
    node.ray.init.address = "auto"
    assert node.ray.init.object_store_memory is None


@pytest.mark.exhaustive
@pytest.mark.slow
def test_submitit(command, tiny, tmp_path, in_processes):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    status, _, told = command("-m", *tiny, "init=kaiming", "hydra/launcher=submitit_local")
    assert status == 0, told
    assert [result["method"] for result in results(tmp_path / "outputs")] == ["kaiming"]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_local_ray_cluster(command, tiny, tmp_path, in_processes):
    """With two GPUs that Ray is told of: each job is bound to one of its own, as on a machine that
    has them."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    in_processes.setenv("RAY_USAGE_STATS_ENABLED", "0")
    in_processes.setenv("RAY_worker_niceness", "0")  # else whatever else is tested goes first
    in_processes.delenv("OMP_NUM_THREADS", raising=False)
    try:
        status, _, told = command(
            "-m", *tiny, "init=kaiming,olora", "hydra/launcher=ray",
            "+hydra.launcher.ray.init.num_gpus=2", "hydra.launcher.ray.remote.num_gpus=1",
            "+hydra.launcher.ray.init.num_cpus=2", "hydra.launcher.ray.remote.num_cpus=1",
            "+hydra.launcher.ray.init.include_dashboard=false",
        )  # fmt: skip
    finally:
        ray.shutdown()
    assert status == 0, told
    found = results(tmp_path / "outputs")
    assert [result["method"] for result in found] == ["kaiming", "olora"]
    places = [result["environment"] for result in found]
    assert [place["threads"] for place in places] == [1, 1]
    assert {place["visible_devices"] for place in places} == {"0", "1"}


def test_a_gpu_a_job_where_there_are_any(monkeypatch):
    for present, expected in ((True, 1), (False, 0)):
        monkeypatch.setattr(launching.torch.cuda, "is_available", lambda found=present: found)
        assert launching.gpus_a_job() == expected


@pytest.mark.exhaustive
def test_optuna_looks_for_a_rate_and_takes_up_its_trials(command, tiny, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ("--config-name", "sweep_optuna", *tiny, "training.validate_every=2")
    assert command(*search, "hydra.sweeper.n_trials=2")[0] == 0
    outputs = tmp_path / "outputs"
    found = outputs / "sweeps" / "optuna-kaiming" / "optimization_results.yaml"
    trials = [json.loads(path.read_text()) for path in outputs.glob("runs/*/result.json")]
    assert len(trials) == 2
    best = max(trial["validation_score"] for trial in trials)
    assert yaml.safe_load(found.read_text())["best_value"] == best
    assert all(1e-5 <= trial["learning_rate"] <= 1e-2 for trial in trials)
    for trial in trials:
        assert trial["validation"]["accuracy"] == trial["validation_score"]
    status, printed, _ = command(*search, "hydra.sweeper.n_trials=3")
    assert (status, printed.count("finished before, skipped")) == (0, 2)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_processes_train_one_run(configured, tiny, tmp_path, in_processes):
    """`accelerate launch`: the losses of one process, in one folder, and one result."""
    settings = [*tiny, "training.steps=6", "training.validate_every=3", "init=pissa"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
         "--main_process_port", "0", "-m", "experiments.train", *settings,
         "runtime.checkpoint_every=2"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
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
        figure = "update_size" if one["split"] == "update" else "loss"
        assert one[figure] == pytest.approx(other[figure], rel=1e-5)
    assert result["n_test"] == expected["n_test"]
    assert result["test"]["loss"] == pytest.approx(expected["test"]["loss"], rel=1e-5)
