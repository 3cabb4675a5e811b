"""Many processes at once, and what killed ones leave."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from stores import LARGE, files, posix_only, some_tensors, started

from lora_init.cache import Cache, key
from lora_init.cache import store as store_module
from lora_init.cache.store import ABANDONED_SECONDS


def value_of(index: int, length: int = 400) -> torch.Tensor:
    return torch.randn(16, length, generator=torch.Generator().manual_seed(index))


def use_at_random(folder: Path, limit: int, seed: int, rounds: int, length: int = 400) -> None:
    """Gets and puts of few keys; any warning or wrong value is an error of the process."""
    warnings.simplefilter("error")
    store, draw = Cache(folder, limit), random.Random(seed)
    for _ in range(rounds):
        index = draw.randrange(12)
        name = key("hammer", 1, index)
        entry = store.get(name)
        if entry is None:
            store.put(name, {"V": value_of(index, length)}, {"index": index})
        else:
            assert entry.metadata == {"index": index}
            assert torch.equal(entry.tensors["V"], value_of(index, length))


def clear_repeatedly(folder: Path, limit: int) -> None:
    store = Cache(folder, limit)
    for _ in range(10):
        store.clear()
        time.sleep(0.02)


@posix_only
def test_many_processes_use_one_small_cache(tmp_path):
    store = Cache(tmp_path / "cache", 100_000)  # all twelve would be 310,000
    place = store.folder, store.limit
    processes = [started(use_at_random, *place, seed, 120) for seed in range(5)]
    processes.append(started(clear_repeatedly, *place))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert 0 < store.usage().bytes <= store.limit
    assert not [path for path in files(store) if path.suffix == ".tmp"]


@pytest.mark.exhaustive
@posix_only
def test_killed_writers_leave_a_usable_cache(tmp_path):
    store = Cache(tmp_path / "cache", 4_000_000)
    draw = random.Random(0)
    left_over = 0
    for seed in range(200):
        process = started(use_at_random, store.folder, store.limit, seed, 10**6, 20_000)
        time.sleep(0.02 + 0.1 * draw.random())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL  # and not a failed assertion before it
        left_over += sum(path.suffix == ".tmp" for path in files(store))
        if seed >= 20 and left_over >= 3:  # on a busy machine many are killed before they write
            break
    assert left_over > 0
    use_at_random(store.folder, store.limit, 99, 30, 20_000)
    later = Cache(store.folder, store.limit)
    later.put(key("svd", 1), some_tensors(), {})
    assert not [path for path in files(store) if path.suffix == ".tmp"]
    assert later.usage().bytes <= store.limit


def put_another(cache: Cache) -> None:
    cache.put(key("svd", 2), some_tensors(), {})


@posix_only
@pytest.mark.parametrize("sweep", [put_another, Cache.clear])
def test_which_temporary_files_are_swept(store, sweep):
    name = key("svd", 1)
    store.put(name, some_tensors(), {})
    finished = started(int)
    finished.join()
    now, old = time.time(), time.time() - ABANDONED_SECONDS - 1
    here, elsewhere = store_module._host(), "00000000"
    expected = {}
    for host, pid, modified, stays in (
        (here, finished.pid, now, False),
        (here, os.getpid(), now, True),
        (here, os.getpid(), old, False),
        (here, 1, now, True),  # another user's, or ours where we are root: alive
        (elsewhere, finished.pid, now, True),
        (elsewhere, 1, old, False),
    ):
        path = store.folder / name[:2] / f".{host}-{pid}-{len(expected):016x}.tmp"
        path.write_bytes(b"half")
        os.utime(path, (modified, modified))
        expected[path] = stays
    sweep(Cache(store.folder, LARGE))
    assert {path: path.exists() for path in expected} == expected
