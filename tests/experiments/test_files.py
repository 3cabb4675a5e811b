"""Files of runs: read whole or refused, and replaced whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from experiments.run.files import read_object, read_regular, remove, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"score": float("nan"), "list": (1, float("inf"))})
    assert json.loads(path.read_text()) == {"score": None, "list": [1, None]}
    with pytest.raises(TypeError):
        write_json(path, {"score": object()})
    assert json.loads(path.read_text())["list"] == [1, None]
    assert names(tmp_path) == ["result.json"]


@pytest.mark.parametrize(
    ("make", "kind"),
    [(Path.mkdir, "a folder"), (os.mkfifo, "a pipe or a device"),
     (lambda path: path.symlink_to("/dev/zero"), "a pipe or a device")],
)  # fmt: skip
def test_only_regular_files_are_read(tmp_path, make, kind):
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=kind):
        read_regular(tmp_path / "x")
    with pytest.raises(ValueError, match="not a file"):
        read_object(tmp_path / "x", links=False)


def test_removing_a_link_keeps_its_target(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("link", "missing"):
        remove(tmp_path / name)
    assert names(tmp_path) == ["kept"]
    assert names(tmp_path / "kept") == ["file"]
