"""`lora-init compare`: the fair protocol on a user's model and table."""

from __future__ import annotations

import copy
import io
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton

from experiments import compare as application
from experiments import train
from experiments.report import output
from experiments.report.gallery import make_canvas
from lora_init.cli import applications
from lora_init.cli.parser import main

COLUMNS = ["--text", "review", "--label", "verdict"]
SMALL = [
    "--methods", "kaiming,pissa", "--seeds", "0", "--rates", "1", "--steps", "2", "--rank", "4",
    "--jobs", "1", "--set", "hydra.sweeper.max_extensions=0", "--set", "runtime.device=cpu",
]  # fmt: skip


@pytest.fixture
def compare(capsys, tmp_path, tiny_encoder, reviews_csv):
    """The exit code, standard output and standard error of a command."""

    def run(*words, model=tiny_encoder, data=reviews_csv):
        given = [*COLUMNS, *SMALL, "--out", tmp_path / "out", *words]
        code = main(["compare", str(model), str(data), *map(str, given)])
        return code, *capsys.readouterr()

    return run


@pytest.mark.exhaustive
def test_a_comparison_ends_with_a_page(compare, monkeypatch, tmp_path):
    """The sweep runs in this process, and the charts are not drawn, to save their time."""

    def in_process(command, **_):
        monkeypatch.setattr(sys, "argv", command[2:])
        train.main()
        return SimpleNamespace(returncode=0)

    # A sweep in this process replaces Hydra's store of settings and plugins.
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", copy.deepcopy(store.repo))
    # GlobalHydra is left out: an instance that both dictionaries hold would stay initialized.
    others = {kind: one for kind, one in Singleton._instances.items() if kind is not GlobalHydra}
    monkeypatch.setattr(Singleton, "_instances", others)
    monkeypatch.setattr(application, "subprocess", SimpleNamespace(run=in_process))
    monkeypatch.setattr(
        output, "draw", lambda summarizer, views, majority, metric, _: (
            [], make_canvas(summarizer, views, metric)
        ),
    )  # fmt: skip
    code, shown, remarks = compare("--json")
    assert code == 0, remarks
    found = json.loads(shown)
    assert found["page"] == str(tmp_path / "out" / "report" / "index.html")
    assert [row["method"] for row in found["methods"]] == ["kaiming", "pissa"]
    results = [json.loads(path.read_text()) for path in tmp_path.glob("out/runs/*/result.json")]
    scores = {result["method"]: result["score"] for result in results}
    assert scores == {row["method"]: row["score"] for row in found["methods"]}
    assert "Not resolved" in remarks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "revew"], "--text 'revew': "),
        (["--label", "stars"], "it has review, verdict, film"),
        (["--label", "review"], "must be a column of classes"),
        (["--methods", "kaiming,pisa"], "did you mean 'pissa'"),
        (["--methods", ","], "must be names with commas"),
        (["--methods", "kaiming,from_delta"], "from_delta is not supported: it reads"),
        (["--seeds", "one"], "must be integers with commas"),
        (["--seeds", "1,1"], "--seeds [1, 1] is not supported"),
        (["--rank", "64"], "--methods pissa: "),
        (["--rank", "0"], "--rank 0 is not supported"),
        (["--steps", "0"], "--steps 0 is not supported: must be an integer >= 1"),
        (["--rates", "0"], "--rates 0 is not supported"),
        (["--set", "training.stepz=1"], "training.stepz"),
        (["--set", "training.steps"], "training.steps"),
    ],
)
def test_mistakes_are_named_before_a_run_starts(compare, tmp_path, words, message):
    code, shown, remarks = compare(*words)
    assert (code, shown) == (1, "")
    assert message in remarks
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "no such file"),
        ("table.xlsx", b"PK", "must be a file ending in one of .jsonl"),
        ("binary.csv", b"\xff\xfe\x00review,verdict\x00", "not readable as csv"),
        ("empty.csv", b"", "not readable as csv"),
        ("header.csv", b"review,verdict\n", "the file has no rows"),
        ("one.csv", b"review,verdict\n" + b"".join(b"%d,good\n" % n for n in range(60)),
         "classification needs two or more"),
        ("few.csv", b"review,verdict\n" + b"".join(b"%d,%d\n" % (n, n % 2) for n in range(16)),
         "Each split must have at least 5, so give about 30 rows or more"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_compared_on(compare, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, _, remarks = compare(data=tmp_path / name)
    assert code == 1
    assert message in remarks
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize("model", ["/no/such/folder", "no-such-owner/no-such-model"])
def test_a_model_that_is_not_there(compare, model):
    code, _, remarks = compare(model=model)
    assert code == 1
    assert model in remarks


def test_a_full_disk(compare, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    assert "has 1 MiB left: must have" in compare()[2]


def test_a_file_in_the_place_of_the_folder(compare, tmp_path):
    (tmp_path / "out").write_text("")
    assert "is not a folder" in compare()[2]


def test_an_installation_without_the_extra(compare, monkeypatch):
    def without(name):
        raise ModuleNotFoundError(f"No module named 'hydra' for {name}", name="hydra")

    monkeypatch.setattr(applications, "import_module", without)
    assert "pip install 'lora_init[experiments]'" in compare()[2]


def test_a_failed_run_is_an_error(compare, monkeypatch):
    failed = SimpleNamespace(run=lambda *_, **__: SimpleNamespace(returncode=1))
    monkeypatch.setattr(application, "subprocess", failed)
    code, _, remarks = compare()
    assert code == 1
    assert "Give the same command again to continue it" in remarks


def test_the_output_of_a_run_reaches_a_stream_without_a_descriptor():
    """A notebook's standard output is such a stream."""
    shown = io.StringIO()
    with application.descriptor(shown) as stream:
        subprocess.run([sys.executable, "-c", "print('first'); print('last')"], stdout=stream)
    assert shown.getvalue() == "first\nlast\n"
