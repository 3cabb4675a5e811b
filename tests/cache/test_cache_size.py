"""A limit on the size: the least recently used entries go first, and no file of others."""

from __future__ import annotations

import os
import random

import pytest
import torch
from stores import LARGE, files

from lora_init.cache import Cache, key
from lora_init.cache.store import Usage


def entry_bytes(tmp_path) -> int:
    probe = Cache(tmp_path / "probe", LARGE)
    probe.put(key("svd", 1, 0), {"U": torch.zeros(1000)}, {})
    return probe.usage().bytes


def test_the_least_recently_used_go_first(tmp_path, no_warnings):
    size = entry_bytes(tmp_path)
    store = Cache(tmp_path / "cache", 10 * size)
    names = [key("svd", 1, index) for index in range(11)]
    for index, name in enumerate(names[:10]):
        store.put(name, {"U": torch.zeros(1000)}, {})
        os.utime(store._path(name), (index, index))
    assert store.usage() == Usage(10, 10 * size)
    assert store.get(names[0]) is not None  # used: now the last to go
    store.put(names[10], {"U": torch.zeros(1000)}, {})
    gone = {index for index, name in enumerate(names) if not store._path(name).exists()}
    assert gone == {1, 2}  # down to nine tenths of the limit
    assert store.usage() == Usage(9, 9 * size)


def test_the_limit_holds_over_many_entries(tmp_path, no_warnings):
    store = Cache(tmp_path / "cache", 50_000)
    draw = random.Random(0)
    for index in range(150):
        store.put(key("svd", 1, index), {"U": torch.zeros(draw.randrange(3000))}, {})
        assert store.usage().bytes <= store.limit
    assert store.usage().bytes > 0.7 * store.limit
    assert store.get(key("svd", 1, 149)) is not None


def test_a_result_larger_than_the_cache_is_not_kept(tmp_path):
    store = Cache(tmp_path / "cache", 5000)
    store.put(key("svd", 1, 0), {"U": torch.zeros(100)}, {})
    with pytest.warns(UserWarning, match="limited to 5000 bytes. Set LORA_INIT_CACHE_BYTES"):
        store.put(key("svd", 1, 1), {"U": torch.zeros(2000)}, {})
    assert store.get(key("svd", 1, 0)) is not None
    assert store.get(key("svd", 1, 1)) is None


def test_a_result_larger_than_the_cache_is_neither_copied_nor_hashed(tmp_path):
    store = Cache(tmp_path / "cache", LARGE)
    nowhere = torch.empty(50_000, 50_000, device="meta")  # its values cannot be read
    with pytest.warns(UserWarning, match="a result of 10000000000 bytes or more is not cached"):
        store.put(key("svd", 1, 0), {"U": nowhere}, {})
    assert not store.folder.exists()


def test_only_the_caches_own_files_are_touched(tmp_path):
    folder = tmp_path / "cache"
    foreign = [
        folder / "notes.txt",
        folder / "models" / f"{'0' * 64}-0.safetensors",
        folder / "ab" / "model.safetensors",
        folder / "ab" / "draft.tmp",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(50_000))
        os.utime(path, (0, 0))
    store = Cache(folder, 5000)
    for index in range(20):
        store.put(key("svd", 1, index), {"U": torch.zeros(300)}, {})
    assert store.clear().entries > 0
    assert store.usage() == Usage(0, 0)
    assert files(store) == sorted(foreign)
