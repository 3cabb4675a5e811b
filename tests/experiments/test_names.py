"""Names and links lead nowhere outside `paths.outputs`: nothing there is written or deleted."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from experiments.config.names import check_name, sweep_path
from experiments.errors import ConfigurationError
from experiments.run.execute import execute
from experiments.run.folder import identify

HOSTILE = [
    "../../victim", "..", ".", "", "a/../../../victim", "/victim", "~", "~root/x", "a/b", "a\\b",
    "..\\victim", "a\0b", "a\nb", "a\tb", " a", "a ", "a.", ".hidden", "x" * 201, "é" * 101,
    "a\N{FULLWIDTH SOLIDUS}b", "\N{TWO DOT LEADER}", "a\N{RIGHT-TO-LEFT OVERRIDE}b",
    "a\N{ZERO WIDTH SPACE}b", "\N{FRACTION SLASH}x", "\N{LATIN SMALL LIGATURE FFI}", "a:b", "a*",
    "$HOME", "`x`", 5, None,
]  # fmt: skip
HARMLESS = ["default", "a", "rates 1e-3", "v1.2", "lr=1e-3,r=8", "naïve-größe", "x" * 200, "a..b"]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_name_that_is_no_folders_name_is_refused(configured, name):
    run = configured()
    for make in (
        lambda: check_name("sweep", name),
        lambda: sweep_path("outputs", name),
        lambda: dataclasses.replace(run, sweep=name),
    ):
        with pytest.raises(ConfigurationError, match=r"^sweep=.* must be the name of one folder"):
            make()


@pytest.mark.parametrize("name", HARMLESS)
def test_other_names_are_taken(configured, name):
    assert dataclasses.replace(configured(), sweep=name).sweep == name
    assert sweep_path("outputs", name) == Path("outputs") / "sweeps" / name


@pytest.mark.parametrize("outputs", ["", "~", "~/x", "~root/x", "a\0b"])
def test_a_results_folder_that_no_shell_made_is_refused(configured, outputs):
    run = configured()
    with pytest.raises(ConfigurationError, match=r"^paths\.outputs="):
        dataclasses.replace(run.paths, outputs=outputs)


@pytest.mark.parametrize("part", ["../../x", "..", "/", "a" * 5000, "é" * 500, "\n"])
def test_a_runs_folder_lies_in_the_results(configured, tmp_path, part):
    """Labels of models and data may hold anything: the folder's name does not."""
    run = configured(f"paths.outputs={tmp_path}")
    run.model.name = run.data.name = run.init.name = part
    folder = identify(run)
    assert folder.path.resolve().parent == tmp_path / "runs"
    folder.start_over()
    folder.lock_file.touch()
    folder.result_file.touch()


@pytest.fixture
def victim(tmp_path) -> dict[Path, str]:
    """Files outside the results, and what is in them."""
    files = {}
    for name in ("jobs/a.json", "multirun.yaml", "result.json", "checkpoint/.x", "manifest.json"):
        path = tmp_path / "victim" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        files[path] = "mine"
    return files


def unharmed(tmp_path, victim) -> bool:
    found = {path: path.read_text() for path in (tmp_path / "victim").rglob("*") if path.is_file()}
    return found == victim


# A setting that no run takes: where a name is not refused, nothing is trained either.
NO_RUN = "training.steps=0"


@pytest.mark.parametrize("name", ["../../victim", "{tmp_path}/victim", "x/../../../victim"])
def test_a_sweep_deletes_nothing_elsewhere(command, tiny, tmp_path, victim, name):
    (tmp_path / "outputs" / "sweeps" / "x").mkdir(parents=True)
    sweep = name.format(tmp_path=tmp_path)
    status, _, told = command("-m", *tiny, NO_RUN, "init=kaiming,pissa", f"sweep={sweep}")
    assert unharmed(tmp_path, victim)
    assert status == 1
    assert told.startswith("sweep=")
    assert "must be the name of one folder" in told


@pytest.mark.parametrize(
    ("link", "target"),
    [("sweeps", ""), ("sweeps/default", ""), ("sweeps/default/jobs", "jobs"),
     ("sweeps/default/multirun.yaml", "multirun.yaml"), ("sweeps/default/.lock", "result.json")],
)  # fmt: skip
def test_a_link_out_of_the_results_is_refused(command, tiny, tmp_path, victim, link, target):
    place = tmp_path / "outputs" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "victim" / target)
    status, _, told = command("-m", *tiny, NO_RUN, "init=kaiming,pissa")
    assert unharmed(tmp_path, victim)
    assert status == 1
    assert "a link leads to" in told


@pytest.mark.parametrize("link", ["runs", "run"])
def test_a_run_behind_a_link_is_refused(configured, tiny, tmp_path, victim, link):
    run = configured(*tiny)
    folder = identify(run)
    place = folder.path.parent if link == "runs" else folder.path
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigurationError, match="a link leads to"):
        execute(run)
    assert unharmed(tmp_path, victim)


def test_links_inside_a_run_are_replaced_and_not_followed(configured, tmp_path, victim):
    folder = identify(configured(f"paths.outputs={tmp_path}/outputs"))
    folder.path.mkdir(parents=True)
    for name in ("result.json", "checkpoint", "metrics.jsonl"):
        (folder.path / name).symlink_to(tmp_path / "victim" / name)
    folder.remove_scratch()
    folder.forget_checkpoint()
    folder.start_over()
    assert os.listdir(folder.path) == []
    assert unharmed(tmp_path, victim)


def test_the_folder_of_all_results_may_be_a_link(configured, tiny, tmp_path, monkeypatch):
    """As to a larger disk."""
    from experiments.run import execute as execution

    (tmp_path / "disk").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "disk")
    monkeypatch.setattr(execution, "carry_out", lambda *arguments: {"done": True})
    assert execute(configured(*tiny)) == {"done": True}
