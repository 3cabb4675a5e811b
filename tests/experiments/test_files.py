"""Files of runs: read whole or refused, replaced whole, and without leftovers of dead writers."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.run.files import host, read_object, read_regular, remove, scratch_path
from experiments.run.folder import write_bytes, write_json

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import sys, time
from pathlib import Path
from experiments.run import folder as runs
runs.os.fsync = lambda descriptor: (print("half", flush=True), time.sleep(60))
runs.write_bytes(Path(sys.argv[1]), b"half of it")
"""


@pytest.fixture
def killed_writer(tmp_path):
    """Start a process that writes a file, and kill it in the middle."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "result.json")],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout.readline() == "half\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path, killed_writer):
    (left,) = names(tmp_path)
    write_json(tmp_path / "metrics.json", {})
    assert left in names(tmp_path), "its writer lives"
    killed_writer.send_signal(signal.SIGKILL)
    killed_writer.wait()
    assert names(tmp_path) == sorted([left, "metrics.json"])
    write_json(tmp_path / "other.json", {})
    assert names(tmp_path) == ["metrics.json", "other.json"]


@pytest.mark.parametrize(
    ("name", "age", "stays"),
    [(f".result.json-{host()}-{2**22 + 9}-0123abcd.tmp", 0, False),
     (f".result.json-{host()}-1-0123abcd.tmp", 9e9, True),
     (".result.json-00000000-1-0123abcd.tmp", 60, True),
     (".result.json-00000000-1-0123abcd.tmp", 2 * 24 * 3600, False),
     (".hidden", 9e9, True), ("result.json.tmp", 9e9, True),
     (".result.json-0123abcd.tmp", 9e9, True)],
)  # fmt: skip
def test_only_what_dead_writers_left_is_removed(tmp_path, name, age, stays):
    """Of another machine, whose processes are not known here, only what is a day old."""
    for path in (tmp_path / name, tmp_path / f"x{name}"):
        path.touch()
        os.utime(path, (time.time() - age,) * 2 if age < 9e9 else (0, 0))
    scratch_path(tmp_path / "new.json")
    assert (tmp_path / name).exists() == stays
    assert (tmp_path / f"x{name}").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_files_have_the_permissions_that_the_user_wants(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "result.json", b"{}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "result.json").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize(
    ("make", "kind"),
    [(Path.mkdir, "a folder"), (os.mkfifo, "a pipe or a device"),
     (lambda path: path.symlink_to("/dev/zero"), "a pipe or a device")],
)  # fmt: skip
def test_what_is_no_file_is_not_read(tmp_path, make, kind):
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=kind):
        read_regular(tmp_path / "x")
    with pytest.raises(ValueError, match="not a file"):
        read_object(tmp_path / "x", links=False)


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("link", "missing"):
        remove(tmp_path / name)
    assert names(tmp_path) == ["kept"]
    assert names(tmp_path / "kept") == ["file"]
