"""A run whose folder is damaged says which file is, and is completed all the same."""

from __future__ import annotations

import json
import os
import shutil
from itertools import product
from pathlib import Path

import pytest
from products import every_value, thinned

from experiments.errors import ConfigurationError, DamagedFile
from experiments.run.execute import execute
from experiments.run.failures import read_failure, refuse_to_diverge_again
from experiments.run.folder import RunFolder, identify
from experiments.run.lock import beats_elsewhere, heartbeat, is_held
from experiments.run.metrics import read_metrics
from experiments.run.outputs import open_outputs
from experiments.run.resume import (
    prepare_folder,
    read_first_start,
    usable_checkpoint,
)
from experiments.run.state import state_of
from experiments.training import loop as training
from experiments.training.checkpoint import Checkpoints

UNMEASURED = ("measures.forgetting_texts=0", "measures.intruder_layers=0",
              "measures.spectra_layers=1", "runtime.cache=false")  # fmt: skip


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(at * len(content)), len(content) - 1)] ^= 4
    path.write_bytes(content)


def replace(path: Path, make) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "first bit": lambda path: flip(path, 0),
    "early bit": lambda path: flip(path, 0.1),
    "middle bit": lambda path: flip(path, 0.5),
    "last bit": lambda path: flip(path, 1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe" * 999),
    "a list": lambda path: path.write_text("[1, 2]\n" * 999),
    "null": lambda path: path.write_text("null\n" * 999),
    "an object": lambda path: path.write_text("{}\n" * 999),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a folder": lambda path: replace(path, Path.mkdir),
    "a pipe": lambda path: replace(path, os.mkfifo),
    "a link": lambda path: replace(path, lambda p: p.symlink_to(p.parent / "nowhere")),
    "a circle": lambda path: replace(path, lambda p: p.symlink_to(p)),
    "unreadable": lambda path: path.chmod(0),
}
CONTINUED = ("checkpoint/training.safetensors", "metrics.jsonl", "init.json", "spectra.json")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, tiny_encoder, reviews_csv, whole_composition):
    """A run that was broken off after its second step, and its configuration."""
    from experiments.config.resolve import resolve

    outputs = tmp_path_factory.mktemp("pristine")
    overrides = (
        "model=local", f"model.path={tiny_encoder}", "model.name=tiny", "data=table",
        f"data.path={reviews_csv}", "data.text_column=review", "data.label_column=verdict",
        "training.steps=3", "training.batch_size=4", "lora.r=2", "runtime.device=cpu",
        "runtime.checkpoint_every=1", f"paths.outputs={outputs}", "init=pissa", *UNMEASURED,
    )  # fmt: skip
    run = resolve(whole_composition("train", overrides))
    backward, steps = training.backward, iter(range(2))

    def interrupted(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return backward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            execute(run)
    return run, identify(run)


@pytest.fixture
def broken(pristine, tmp_path):
    """A copy of that run to do harm to, and its configuration."""
    run, folder = pristine
    path = tmp_path / "outputs" / "runs" / folder.path.name
    shutil.copytree(folder.path, path)
    run.paths.outputs = str(tmp_path / "outputs")
    return run, RunFolder(folder.id, path)


class Claimed:
    begin = staticmethod(lambda: None)


def test_an_intact_run_continues(broken, capsys):
    run, folder = broken
    saved = prepare_folder(run, folder, Claimed, True)
    assert saved.progress.step == 2
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", CONTINUED)
def test_a_damaged_file_is_named_and_the_run_starts_over(broken, capsys, name, damage):
    run, folder = broken
    if damage == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    DAMAGE[damage](folder.path / name)
    assert prepare_folder(run, folder, Claimed, True) is None
    told = capsys.readouterr().out.replace("\n", "")
    if (name, damage) == (CONTINUED[0], "missing"):
        assert "damaged" not in told, "a run that was killed before its first checkpoint"
    else:
        assert f"{folder.path / name} is damaged" in told
        assert "starts over" in told
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "config.yaml", "environment.json",
    ]  # fmt: skip


WRITTEN_ANEW = ("config.yaml", "environment.json", "running.json", "failed.json", "result.json",
                "predictions.npz", "end.json", "answers.jsonl", "adapter")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "damage"),
    every_value(product(WRITTEN_ANEW, [kind for kind in DAMAGE if kind != "missing"]), 2),
)
def test_files_that_a_continued_run_overwrites_do_not_stop_it(broken, name, damage):
    """Left by a process that was killed at the run's end."""
    run, folder = broken
    path = folder.path / name
    if not path.exists():
        path.write_text('{"run_id": 5}')
    DAMAGE[damage](path)
    assert state_of(folder) in ("died", "failed")
    saved = prepare_folder(run, folder, Claimed, True)
    assert saved is not None
    assert saved.progress.step == 2
    kept = {"config.yaml", "environment.json", "init.json", "spectra.json", "metrics.jsonl",
            "checkpoint"}  # fmt: skip
    assert {p.name for p in folder.path.iterdir()} == kept
    assert isinstance(json.loads((folder.path / "environment.json").read_text()), dict)


@pytest.mark.parametrize("place", ["folder", "checkpoint"])
@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda path: path.symlink_to(path)],
                         ids=["a file", "a pipe", "a circle"])  # fmt: skip
def test_something_else_in_a_folders_place_is_replaced(broken, capsys, place, make):
    run, folder = broken
    path = folder.path if place == "folder" else folder.checkpoint_file.parent
    shutil.rmtree(path)
    make(path)
    assert prepare_folder(run, folder, Claimed, True) is None
    assert "not a folder" in capsys.readouterr().out
    assert folder.path.is_dir()


FINISHED = {"run_id": "id", "status": "finished", "tested": True, "metric": "accuracy",
            "score": 0.5, "validation_score": None}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'"finished"',
     *(json.dumps({**FINISHED, **change}).encode() for change in (
         {"run_id": None}, {"status": "x"}, {"tested": "yes"}, {"tested": 1}, {"score": None},
         {"score": "0.5"}, {"score": [1]}, {"validation_score": "x"}, {"score": True},
     ))],
    ids=lambda content: ascii(content[:60]),
)  # fmt: skip
def test_a_damaged_result_is_none_and_is_named(tmp_path, content, capsys):
    folder = RunFolder("id", tmp_path / "run")
    folder.path.mkdir()
    folder.result_file.write_bytes(json.dumps(FINISHED).encode())
    assert folder.finished() == FINISHED
    assert folder.damage() is None
    folder.result_file.write_bytes(content)
    assert folder.finished() is None
    assert usable_checkpoint(folder) is None
    told = capsys.readouterr().out.replace("\n", "")
    assert f"{folder.result_file} is damaged" in told
    assert "starts over" in told


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "x", '{"updated": 5}', '{"updated": "2020-01-01T00:00:00Z"}',
     '{"updated": "9999-01-01T00:00:00Z", "host": "h", "pid": 1, "step": 1, "steps": 2}',
     '{"updated": "2999-01-01T00:00:00Z", "host": 5, "pid": 1, "step": 1, "steps": 2}'],
)  # fmt: skip
def test_a_damaged_heartbeat_is_none(tmp_path, content):
    folder = RunFolder("id", tmp_path / "run")
    folder.path.mkdir()
    folder.running_file.write_text(content)
    assert heartbeat(folder) is None
    assert not beats_elsewhere(folder)
    assert not is_held(folder)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"run_id": "id"}', '{"run_id": "id", "reason": ["diverged"]}']
)
def test_a_damaged_failure_is_none(tmp_path, content):
    folder = RunFolder("id", tmp_path / "run")
    folder.path.mkdir()
    folder.failed_file.write_text(content)
    assert read_failure(folder) is None
    refuse_to_diverge_again(folder)


@pytest.mark.parametrize("change", [{"seconds": 5}, {"seconds": {}}, {"trainable_parameters": "x"}])
def test_figures_of_the_first_start_are_checked(broken, change):
    _, folder = broken
    init = read_first_start(folder)
    folder.init_file.write_text(json.dumps({**init, **change}))
    with pytest.raises(DamagedFile, match=r"init\.json is damaged"):
        read_first_start(folder)


@pytest.mark.parametrize(
    "row", ["5", "[]", "{}", '{"step": "1", "split": "x"}', '{"step": 1}', "x"]
)
def test_rows_without_step_or_split_are_damage(tmp_path, row):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "split": "train"}}\n{row}\n')
    with pytest.raises(DamagedFile, match=r"metrics\.jsonl is damaged"):
        read_metrics(path)


@pytest.mark.parametrize("name", ["checkpoint/training.safetensors", "metrics.jsonl", "init.json"])
def test_a_damaged_run_is_completed_with_the_same_figures(broken, tmp_path, name, capsys):
    """End to end: broken off, damaged, asked for again."""
    run, folder = broken
    flip(folder.path / name, 0.5)
    result = execute(run)
    assert "starts over" in capsys.readouterr().out
    assert folder.finished() == json.loads(json.dumps(result))
    steps = [row["step"] for row in read_metrics(folder.metrics_file) if row["split"] == "train"]
    assert steps == [1, 2, 3]
    again = execute(run)
    assert again["test"] == result["test"]


def test_a_checkpoint_that_its_optimizer_refuses_starts_over(broken, monkeypatch, capsys):
    """As one of another version of a library."""
    run, folder = broken

    def refused(*arguments):
        raise ValueError("loaded state dict has a different number of parameter groups")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "restore_optimizer", refused)
        result = execute(run)
    told = capsys.readouterr().out
    assert "different number of parameter groups" in told.replace("\n", " ")
    assert folder.finished() == json.loads(json.dumps(result))
    steps = [row["step"] for row in read_metrics(folder.metrics_file) if row["split"] == "train"]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("harm", ["adapter", "metrics"])
def test_a_run_that_waits_for_its_test_starts_over(configured, tiny, harm, capsys):
    waiting = configured(*tiny, *UNMEASURED, "read_test=false")
    execute(waiting)
    folder = identify(waiting)
    if harm == "adapter":
        weights = folder.path / "adapter" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-5])
    else:
        folder.metrics_file.write_text("{")
    result = execute(configured(*tiny, *UNMEASURED))
    assert result["tested"]
    told = capsys.readouterr().out.replace("\n", "")
    assert "starts over" in told
    assert folder.finished()["score"] == result["score"]


def nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "gone" / "away")


@pytest.mark.parametrize(
    ("make", "told"),
    [(nowhere, "is a link to .*gone/away, which does not exist. Make that folder"),
     (Path.touch, "is not a folder. Remove it"), (os.mkfifo, "is not a folder. Remove it"),
     (lambda path: path.symlink_to(path), "")],
    ids=["a link to nowhere", "a file", "a pipe", "a circle"],
)  # fmt: skip
@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_results_that_cannot_be_written_are_refused_at_the_start(
    command, tiny, tmp_path, make, told, below
):
    make(tmp_path / "outputs")
    outputs = tmp_path / "outputs" / below
    with pytest.raises(ConfigurationError, match=rf"paths\.outputs=.* is not supported: .*{told}"):
        open_outputs(outputs)
    if told.startswith("is a link") and not below:
        for multirun in ([], ["-m"]):
            status, _, error = command(*multirun, *tiny)
            assert status == 1
            assert "paths.outputs=" in error
            assert "Traceback" not in error


@pytest.mark.parametrize("number", [28, 30, 13, 122])
def test_a_full_or_read_only_disk_is_refused_at_the_start(tmp_path, monkeypatch, number):
    def refused(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(ConfigurationError, match=os.strerror(number)) as error:
        open_outputs(tmp_path / "outputs")
    assert "paths.outputs" in str(error.value)
    assert list((tmp_path / "outputs").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "make"),
    thinned(
        [
            pytest.param(name, make, id=f"{name}-{kind}")
            for name in ("run", "sweeps/default/.lock")
            for kind, make in (("folder", Path.mkdir), ("pipe", os.mkfifo), ("link", nowhere))
        ],
        lambda name, make: name,
        lambda name, make: make,
    ),
)
def test_a_lock_that_is_no_file_is_refused(command, configured, tiny, tmp_path, name, make):
    path = tmp_path / "outputs" / name
    if name == "run":
        path = identify(configured(*tiny)).lock_file
    path.parent.mkdir(parents=True)
    make(path)
    status, printed, told = command(*(["-m"] if name != "run" else []), *tiny)
    assert status == 1
    assert str(path) in (printed + told).replace("\n", "")
    assert "Remove" in printed + told
    if name == "run":
        assert not is_held(identify(configured(*tiny)))
