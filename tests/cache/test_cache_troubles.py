"""A disk that is full, read-only, or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from stores import LARGE, files, posix_only, some_tensors

from lora_init.cache import Cache, key
from lora_init.cache.store import Usage


def fails_with(code: int):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_is_said_once_and_leaves_nothing(store, monkeypatch, code, call):
    monkeypatch.setattr(os, call, fails_with(code))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(3):
            store.put(key("svd", 1, index), some_tensors(), {})
    assert len(caught) == 1
    assert "LORA_INIT_CACHE" in str(caught[0].message)
    assert os.strerror(code) in str(caught[0].message)
    assert files(store) == []
    assert store.get(key("svd", 1, 0)) is None
    monkeypatch.undo()
    store.put(key("svd", 1, 0), some_tensors(), {})  # there is room again
    assert store.get(key("svd", 1, 0)) is not None


def test_an_interrupted_write_leaves_nothing(store, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.put(key("svd", 1), some_tensors(), {})
    assert files(store) == []


@contextlib.contextmanager
def unprivileged():
    """As a user whom permissions stop; root is not."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@posix_only
def test_a_read_only_folder_is_still_read():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        store = Cache(Path(folder) / "cache", LARGE)
        name = key("svd", 1)
        store.put(name, some_tensors(), {})
        places = [store.folder, store.folder / name[:2]]
        for place in places:
            place.chmod(0o555)
        with unprivileged():
            reader = Cache(store.folder, LARGE)
            assert torch.equal(reader.get(name).tensors["U"], some_tensors()["U"])
            with pytest.warns(UserWarning, match="cannot be used"):
                reader.put(key("svd", 1, "new"), some_tensors(), {})
            assert reader.clear() == Usage(0, 0)  # nothing could be removed
        for place in places:
            place.chmod(0o755)
        assert store.usage().entries == 1


@posix_only
def test_an_unreadable_entry_is_a_miss():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        store = Cache(Path(folder) / "cache", LARGE)
        store.put(key("svd", 1), some_tensors(), {})
        files(store)[0].chmod(0)
        with unprivileged(), pytest.warns(UserWarning, match="cannot be used"):
            assert store.get(key("svd", 1)) is None
