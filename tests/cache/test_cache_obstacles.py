"""Something else in an entry's place: every look-up ends, is a miss, and raises nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import warnings
from pathlib import Path

import pytest
import torch
from stores import LARGE, files, posix_only, some_tensors, started

from lora_init.cache import Cache, key
from lora_init.cache import store as store_module


def folder_with_a_file(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("keep")


def named_socket(path: Path) -> None:
    place = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as end:  # a short name: a socket's path is limited
        end.bind(f"/proc/self/fd/{place}/{path.name}")
    os.close(place)


def huge_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**42)  # sparse


OBSTACLES = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "folder with a file": folder_with_a_file,
    "socket": named_socket,
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to a folder": lambda path: path.symlink_to("."),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "huge file": huge_file,
}


@contextlib.contextmanager
def at_most(seconds: int):
    def interrupt(*_):
        pytest.fail(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@posix_only
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_an_obstacle_is_a_miss_and_is_replaced_or_passed_over(store, obstacle):
    name = key("svd", 1)
    path = store._path(name)
    path.parent.mkdir(parents=True)
    OBSTACLES[obstacle](path)
    with at_most(30), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert store.get(name) is None
        store.put(name, some_tensors(), {})
        entry = store.get(name)
    if obstacle == "folder with a file":
        assert entry is None
        assert (path / "notes.txt").read_text() == "keep"
    else:
        assert torch.equal(entry.tensors["U"], some_tensors()["U"])


@posix_only
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_usage_eviction_and_clear_pass_obstacles(store, obstacle):
    store.put(key("svd", 1), some_tensors(), {})
    for number, name in enumerate(("entry", "temporary")):
        shard = store.folder / "ab"
        shard.mkdir(exist_ok=True)
        names = {
            "entry": f"ab{number:062x}-4.safetensors",
            "temporary": f".{store_module._host()}-{number}-{number:016x}.tmp",
        }
        OBSTACLES[obstacle](shard / names[name])
    small = Cache(store.folder, 4000)
    with at_most(30), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small.usage()
        small.put(key("svd", 2), some_tensors(), {})
        small.clear()
    assert small.usage().entries == 0


@posix_only
@pytest.mark.parametrize("obstacle", sorted(set(OBSTACLES) - {"folder", "folder with a file"}))
@pytest.mark.parametrize("place", ["cache", "shard"])
def test_an_obstacle_in_a_folders_place_is_said_once(tmp_path, place, obstacle):
    store = Cache(tmp_path / "cache", LARGE)
    name = key("svd", 1)
    path = store.folder if place == "cache" else store.folder / name[:2]
    path.parent.mkdir(exist_ok=True)
    OBSTACLES[obstacle](path)
    with at_most(30), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            store.get(name)
            store.put(name, some_tensors(), {})
        store.usage()
        store.clear()
    assert len(caught) <= 1


def test_a_folder_that_stays_is_named(store):
    name = key("svd", 1)
    path = store._path(name)
    path.mkdir(parents=True)
    (path / "notes.txt").write_text("keep")
    with pytest.warns(UserWarning, match="is not a file of the cache and cannot be removed"):
        assert store.get(name) is None


@posix_only
def test_the_first_use_removes_what_a_killed_writer_left(store):
    """A process that finds every result in the cache never writes, and sweeps all the same."""
    name, other = key("svd", 1), key("svd", 2)
    store.put(name, some_tensors(), {})

    def write():
        store_module.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        store.put(other, some_tensors(), {})

    process = started(write)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(files(store)) == 2
    assert Cache(store.folder, LARGE).get(name) is not None
    assert [path.name for path in files(store)] == [f"{name}-0.safetensors"]


@posix_only
@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022])
def test_the_umask_holds(tmp_path, mask):
    before = os.umask(mask)
    try:
        store = Cache(tmp_path / "cache", LARGE)
        store.put(key("svd", 1), some_tensors(), {})
    finally:
        os.umask(before)
    (path,) = files(store)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert store.folder.stat().st_mode & 0o777 == 0o777 & ~mask
