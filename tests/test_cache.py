"""The cache: keys, round trips, nesting ranks, damage, eviction, and many processes at once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from simulated_device import simulated_cuda

from lora_init.cache import DEFAULT_LIMIT, Cache, default_cache, fingerprint, key, keys, location
from lora_init.cache import store as store_module
from lora_init.cache.__main__ import main
from lora_init.cache.store import ABANDONED_SECONDS, Usage

posix_only = pytest.mark.skipif(os.name != "posix", reason="forks, signals and permissions")
LARGE = 10**9


@pytest.fixture
def store(tmp_path):
    return Cache(tmp_path / "cache", LARGE)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def files(cache: Cache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


def some_tensors(seed: int = 0, size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"U": torch.randn(size, 4, generator=generator), "S": torch.ones(4)}


# Keys and fingerprints.


def plain_fingerprint(tensor: torch.Tensor) -> str:
    """Rows of up to a chunk in one go: what the threads and chunks must amount to."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    row = tensor.element_size() * (tensor.shape[-1] if tensor.ndim > 1 else 1)
    step = max(1, keys.CHUNK_BYTES // max(1, row)) * max(1, row)
    pieces = [values[at : at + step] for at in range(0, len(values), step)] or [b""]
    described = json.dumps([str(tensor.dtype), list(tensor.shape)], separators=(",", ":")).encode()
    digests = [hashlib.sha256(piece).digest() for piece in pieces]
    return hashlib.sha256(b"".join([described, *digests])).hexdigest()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (7,), (0, 3), (3, 0), (5, 3), (1, 300), (300, 1), (2, 3, 50)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_fingerprint_is_a_hash_of_hashes(monkeypatch, threads, shape, dtype):
    monkeypatch.setattr(keys, "CHUNK_BYTES", 128)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tensor = (100 * torch.rand(shape)).to(dtype)
    assert fingerprint(tensor) == plain_fingerprint(tensor)


def test_fingerprint_does_not_depend_on_the_layout():
    weight = torch.randn(40, 30)
    expected = fingerprint(weight)
    padded = torch.zeros(40, 60)
    padded[:, ::2] = weight
    for laid_out in (
        weight.T.contiguous().T,
        padded[:, ::2],
        torch.nn.Parameter(weight),
        weight[:1].expand(40, 30).clone().copy_(weight),
    ):
        assert fingerprint(laid_out) == expected
    stack = torch.randn(3, 40, 30)
    assert fingerprint(stack.mT.contiguous().mT) == fingerprint(stack)
    assert fingerprint(torch.ones(1, 30).expand(40, 30)) == fingerprint(torch.ones(40, 30))


def assert_the_same_on_cuda(folder: Path) -> None:
    weight = torch.randn(40, 30)
    assert fingerprint(weight.cuda()) == fingerprint(weight.cuda().T.contiguous().T)
    assert fingerprint(weight.cuda()) == fingerprint(weight)
    store = Cache(folder, LARGE)
    store.put(key("svd", 1), {"U": weight.cuda()}, {})
    found = store.get(key("svd", 1)).tensors["U"]
    assert found.device.type == "cpu"
    assert torch.equal(found, weight)


def test_on_a_simulated_cuda_device(tmp_path):
    with simulated_cuda():
        assert_the_same_on_cuda(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device(tmp_path):
    assert_the_same_on_cuda(tmp_path)


def test_fingerprint_tells_values_dtypes_and_shapes_apart():
    zeros = torch.zeros(4, 6)
    one_bit = zeros.clone()
    one_bit[3, 5] = 1e-45
    different = [
        zeros,
        one_bit,
        -zeros,
        zeros.reshape(6, 4),
        zeros.reshape(24),
        zeros.reshape(1, 4, 6),
        zeros.to(torch.int32),
        zeros.to(torch.bfloat16),
        torch.zeros(0),
        torch.zeros(0, 4),
    ]
    assert len({fingerprint(tensor) for tensor in different}) == len(different)


@dataclass
class Options:
    niter: int | None = None
    tolerance: float = 1e-4


@dataclass
class OtherOptions:
    niter: int | None = None
    tolerance: float = 1e-4


EQUAL = [
    (({"a": 1, "b": [1, 2]},), ({"b": (1, 2), "a": 1},)),
    ((Options(4),), (Options(niter=4),)),
    ((torch.eye(3),), (torch.eye(3).T,)),
    ((b"abc", None, 1.5), (b"abc", None, 1.5)),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_parts_give_equal_keys(one, other):
    assert key("svd", 1, *one) == key("svd", 1, *other)


def test_whatever_differs_changes_the_key():
    weight = torch.eye(3)
    different = [
        ("svd", 1, weight),
        ("svd", 2, weight),
        ("eigh", 1, weight),
        ("svd", 1, 2 * weight),
        ("svd", 1, weight.double()),
        ("svd", 1, weight, None),
        ("svd", 1, [weight]),
        ("svd", 1, fingerprint(weight)),
        ("svd", 1, {"tensor": fingerprint(weight)}),
        ("svd", 1, Options()),
        ("svd", 1, OtherOptions()),
        ("svd", 1, Options(niter=4)),
        ("svd", 1, Options(tolerance=1e-5)),
        ("svd", 1, {"niter": None, "tolerance": 1e-4}),
        ("svd", 1, "ab", "c"),
        ("svd", 1, "a", "bc"),
        ("svd", 1, "1"),
        ("svd", 1, b"1"),
        ("svd", 1, 1),
        ("svd", 1, 1.0),
        ("svd", 1, True),
        ("svd", 1, float("nan")),
        ("svd", 1, {1: 2}),
        ("svd", 1, {"1": 2}),
        ("svd", 1, [[1, 2]]),
        ("svd", 1, [1], [2]),
    ]
    assert len({key(*parts) for parts in different}) == len(different)


FIXED_KEY = "06dcd7103bec0fdd69652130e98d95dbd22873da643b470fc1e4bcfed2fd7a66"


def test_a_key_is_the_same_in_another_process(tmp_path):
    """No salted hash, no order of a set, no id: and the format is not changed unawares. The
    command line, which is a module's, in the same process."""
    code = (
        "import runpy, torch; from lora_init.cache import key; "
        "print(key('svd', 1, torch.arange(6.0).reshape(2, 3), {'b': 1, 'a': [None, 2.5]})); "
        "runpy.run_module('lora_init.cache', run_name='__main__', alter_sys=True)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"LORA_INIT_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    here = key("svd", 1, torch.arange(6.0).reshape(2, 3), {"a": [None, 2.5], "b": 1})
    found, told = result.stdout.splitlines()
    assert found == here == FIXED_KEY
    assert told.startswith(f"{tmp_path / 'cache'}: 0 entries, 0 bytes of ")
    assert result.stderr == ""


@pytest.mark.parametrize("part", [{1, 2}, Options, object(), torch.float32])
def test_other_parts_are_refused(part):
    with pytest.raises(TypeError, match="cache key: .* convert it"):
        key("svd", 1, part)


def test_a_text_that_is_no_key_is_refused(store):
    with pytest.raises(ValueError, match="'../mine' is not a key"):
        store.get("../mine")
    with pytest.raises(ValueError, match="is not a key"):
        store.put("ab", some_tensors(), {})


# Entries.


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_round_trip(store, no_warnings, dtype):
    values = torch.randn(5, 6).to(dtype)
    tensors = {"U": values, "strided": values.T[::2], "scalar": values[0, 0], "empty": values[:0]}
    metadata = {"method": "gram", "residual": 1.25e-7, "worst": float("inf"), "steps": [1, None]}
    name = key("svd", 1, values)
    assert store.get(name) is None
    store.put(name, tensors, metadata)
    entry = Cache(store.folder, LARGE).get(name)
    assert entry.metadata == metadata
    assert entry.rank is None
    assert entry.tensors.keys() == tensors.keys()
    for label, tensor in tensors.items():
        assert entry.tensors[label].dtype == dtype
        assert torch.equal(entry.tensors[label], tensor)


def test_an_entry_may_hold_metadata_alone(store, no_warnings):
    store.put(key("rank", 1), {}, {"rank": 3})
    assert store.get(key("rank", 1)).metadata == {"rank": 3}


def test_what_was_read_is_the_callers(store):
    name = key("svd", 1)
    store.put(name, {"U": torch.ones(3)}, {})
    store.get(name).tensors["U"].zero_()
    assert torch.equal(store.get(name).tensors["U"], torch.ones(3))


def test_metadata_outside_json_is_refused_and_nothing_is_written(store):
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.put(key("svd", 1), {}, {"weight": object()})
    assert not store.folder.exists()


def test_one_decomposition_serves_every_smaller_rank(store, no_warnings):
    name = key("svd", 1)
    for rank, kept in ((8, 8), (4, 8), (16, 16), (16, 16), (2, 16)):
        store.put(name, {"S": torch.arange(rank)}, {}, rank=rank)
        assert [path.name for path in files(store)] == [f"{name}-{kept}.safetensors"]
    for asked in (None, 1, 8, 16):
        entry = store.get(name, rank=asked)
        assert entry.rank == 16
        assert len(entry.tensors["S"]) == 16
    assert store.get(name, rank=17) is None
    assert store.get(key("svd", 2), rank=1) is None


def test_a_larger_rank_written_meanwhile_stays(store, monkeypatch):
    name = key("svd", 1)
    write = store_module._write

    def overtaken(path, data):
        monkeypatch.setattr(store_module, "_write", write)
        store.put(name, {"S": torch.arange(16)}, {}, rank=16)
        write(path, data)

    monkeypatch.setattr(store_module, "_write", overtaken)
    store.put(name, {"S": torch.arange(8)}, {}, rank=8)
    assert store.get(name, rank=8).rank == 8
    assert store.get(name, rank=9).rank == 16


# Damage.


def flip_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def with_metadata(data: bytes, change) -> bytes:
    """The file with its header's metadata changed, still well-formed."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def drop_metadata(header):
    del header["__metadata__"]


def change_metadata(header):
    header["__metadata__"]["metadata"] = '{"a": 2}'


def rename_tensor(header):
    header["V"] = header.pop("U")


DAMAGE = {
    "empty": lambda data: b"",
    "truncated header": lambda data: data[:20],
    "truncated payload": lambda data: data[:-4],
    "longer": lambda data: data + b"\0",
    "flipped bit": flip_last,
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"<html>not found</html>",
    "no metadata": lambda data: with_metadata(data, drop_metadata),
    "other metadata": lambda data: with_metadata(data, change_metadata),
    "other names": lambda data: with_metadata(data, rename_tensor),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_a_miss_and_is_removed(store, damage):
    name = key("svd", 1)
    store.put(name, some_tensors(), {"a": 1}, rank=4)
    (path,) = files(store)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="a damaged file in the cache"):
        assert store.get(name, rank=2) is None
    assert files(store) == []
    store.put(name, some_tensors(), {"a": 1}, rank=4)
    assert torch.equal(store.get(name).tensors["U"], some_tensors()["U"])


@pytest.mark.parametrize("moved", ["key", "rank"])
def test_another_entrys_file_is_a_miss(store, moved):
    mine, theirs = key("svd", 1, "mine"), key("svd", 1, "theirs")
    store.put(theirs, some_tensors(), {}, rank=4)
    (path,) = files(store)
    asked = mine if moved == "key" else theirs
    target = store._path(asked, 4 if moved == "key" else 8)
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    with pytest.warns(UserWarning, match="damaged"):
        assert store.get(asked, rank=4) is None


def test_every_single_damaged_byte_is_found(store):
    """Never another exception, never a wrong value, wherever the damage is."""
    name = key("svd", 1)
    store.put(name, {"S": torch.tensor([1.0, 2.0])}, {"a": 1}, rank=2)
    (path,) = files(store)
    intact = path.read_bytes()
    draw = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at in range(len(intact)):
            for byte in {intact[at] ^ 1, intact[at] ^ 128, draw.randrange(256)} - {intact[at]}:
                path.write_bytes(intact[:at] + bytes([byte]) + intact[at + 1 :])
                entry = store.get(name, rank=2)
                # White space between the header and the tensors says nothing.
                assert entry is None or intact[at : at + 1] == b" "
                assert entry is None or entry.tensors["S"].tolist() == [1.0, 2.0]


def test_damage_is_said_once(store):
    for index in range(3):
        name = key("svd", 1, index)
        store.put(name, some_tensors(), {})
        for path in files(store):
            path.write_bytes(b"")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert store.get(name) is None
        assert len(caught) == (index == 0)


def test_a_smaller_rank_serves_where_the_larger_one_is_damaged(store):
    name = key("svd", 1)
    store.put(name, {"S": torch.arange(8)}, {}, rank=8)
    store._path(name, 4).write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        assert store.get(name, rank=4).rank == 8


# Size.


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
        os.utime(store._path(name, 0), (index, index))
    assert store.usage() == Usage(10, 10 * size)
    assert store.get(names[0]) is not None  # used: now the last to go
    store.put(names[10], {"U": torch.zeros(1000)}, {})
    gone = {index for index, name in enumerate(names) if not store._path(name, 0).exists()}
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
    with pytest.warns(UserWarning, match=r"limited to 5000 \(LORA_INIT_CACHE_BYTES\)"):
        store.put(key("svd", 1, 1), {"U": torch.zeros(2000)}, {})
    assert store.get(key("svd", 1, 0)) is not None
    assert store.get(key("svd", 1, 1)) is None


def test_a_look_at_the_folder_is_rare(tmp_path, monkeypatch):
    store = Cache(tmp_path / "cache", LARGE)
    looks = []
    look = store._look_after
    monkeypatch.setattr(store, "_look_after", lambda: looks.append(1) or look())
    for index in range(20):
        store.put(key("svd", 1, index), some_tensors(), {})
    assert len(looks) == 1


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


# Several processes. They are forked, so that each costs milliseconds and not an import of torch.


def started(function, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def value_of(index: int, rank: int, length: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(16, length, generator=generator)[:rank].clone()


def use_at_random(folder: Path, limit: int, seed: int, rounds: int, length: int = 400) -> None:
    """Gets and puts of few keys; any warning or wrong value is an error of the process."""
    warnings.simplefilter("error")
    store, draw = Cache(folder, limit), random.Random(seed)
    for _ in range(rounds):
        index, rank = draw.randrange(12), draw.choice((1, 2, 4, 8, 16))
        name = key("hammer", 1, index)
        entry = store.get(name, rank=rank)
        if entry is None:
            store.put(name, {"V": value_of(index, rank, length)}, {"index": index}, rank=rank)
        else:
            assert entry.rank >= rank
            assert entry.metadata == {"index": index}
            assert torch.equal(entry.tensors["V"], value_of(index, entry.rank, length))


def clear_repeatedly(folder: Path, limit: int) -> None:
    store = Cache(folder, limit)
    for _ in range(10):
        store.clear()
        time.sleep(0.02)


@posix_only
def test_many_processes_use_one_small_cache(tmp_path):
    store = Cache(tmp_path / "cache", 100_000)  # all twelve at rank 16 would be 310,000
    place = store.folder, store.limit
    processes = [started(use_at_random, *place, seed, 300) for seed in range(6)]
    processes.append(started(clear_repeatedly, *place))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 7
    assert 0 < store.usage().bytes <= store.limit
    assert not [path for path in files(store) if path.suffix == ".tmp"]


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


def test_an_entry_evicted_while_it_is_looked_up_is_a_miss(store, monkeypatch, no_warnings):
    name = key("svd", 1)
    monkeypatch.setattr(store, "_ranks", lambda key: [4])
    assert store.get(name, rank=4) is None


# A disk in trouble.


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


@posix_only
def test_a_disk_that_fills_up_midway(store):
    """A real one: a limit on the size of this process's files, in a process of its own."""

    def write():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.warns(UserWarning, match="cannot be used"):
            store.put(key("svd", 1, 0), some_tensors(size=10_000), {})
        store.put(key("svd", 1, 1), some_tensors(), {})

    process = started(write)
    process.join()
    assert process.exitcode == 0
    assert len(files(store)) == 1
    assert store.get(key("svd", 1, 1)) is not None


def test_an_interrupted_write_leaves_nothing(store, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.put(key("svd", 1), some_tensors(), {})
    assert files(store) == []


def test_a_folder_that_cannot_be_there(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = Cache(tmp_path / "file" / "cache", LARGE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert store.get(key("svd", 1)) is None
            store.put(key("svd", 1), some_tensors(), {})
    assert ["cannot be used" in str(warning.message) for warning in caught] == [True]
    assert store.usage() == store.clear() == Usage(0, 0)


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
        store.put(name, some_tensors(), {}, rank=4)
        places = [store.folder, store.folder / name[:2]]
        for place in places:
            place.chmod(0o555)
        with unprivileged():
            reader = Cache(store.folder, LARGE)
            assert torch.equal(reader.get(name, rank=4).tensors["U"], some_tensors()["U"])
            with pytest.warns(UserWarning, match="cannot be used"):
                reader.put(name, some_tensors(), {}, rank=8)
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


# Where it is.


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in ("LORA_INIT_CACHE", "LORA_INIT_CACHE_BYTES", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return monkeypatch


@pytest.mark.parametrize("value", ["off", "0", "OFF"])
def test_switched_off(environment, value):
    environment.setenv("LORA_INIT_CACHE", value)
    assert default_cache() is None


@pytest.mark.parametrize(
    ("platform", "settings", "expected"),
    [
        ("linux", {}, ".cache/lora_init"),
        ("linux", {"XDG_CACHE_HOME": "{home}/xdg"}, "xdg/lora_init"),
        ("darwin", {}, "Library/Caches/lora_init"),
        ("win32", {"LOCALAPPDATA": "{home}/Local"}, "Local/lora_init"),
        ("win32", {}, "AppData/Local/lora_init"),
        ("linux", {"LORA_INIT_CACHE": "{home}/mine"}, "mine"),
        ("linux", {"LORA_INIT_CACHE": "~/mine"}, "mine"),
        ("linux", {"LORA_INIT_CACHE": ""}, ".cache/lora_init"),
    ],
)
def test_where_it_is(environment, tmp_path, platform, settings, expected):
    environment.setattr(location.sys, "platform", platform)
    for name, value in settings.items():
        environment.setenv(name, value.format(home=tmp_path))
    store = default_cache()
    assert store.folder == tmp_path / expected
    assert store.limit == DEFAULT_LIMIT == 5 * 2**30
    assert default_cache() is store
    assert not store.folder.exists()


def test_limit_of_the_default_cache(environment):
    environment.setenv("LORA_INIT_CACHE_BYTES", "123456")
    assert default_cache().limit == 123456


@pytest.mark.parametrize("value", ["5GB", "-1", "0", "1e9"])
def test_a_wrong_limit_is_refused(environment, value):
    environment.setenv("LORA_INIT_CACHE_BYTES", value)
    with pytest.raises(ValueError, match=f"LORA_INIT_CACHE_BYTES='{value}': expected a positive"):
        default_cache()


def test_a_user_without_a_home_has_no_cache(environment):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    environment.setattr(location.Path, "home", homeless)
    environment.setattr(location.sys, "platform", "linux")
    assert default_cache() is None


def test_the_command_line(tmp_path, environment, capsys):
    store = Cache(tmp_path / "cache", 2_000_000)
    store.put(key("svd", 1), some_tensors(), {})
    usage = store.usage()
    environment.setenv("LORA_INIT_CACHE", str(store.folder))
    environment.setenv("LORA_INIT_CACHE_BYTES", "2000000")
    main([])
    assert capsys.readouterr().out == (
        f"{store.folder}: 1 entries, {usage.bytes:,} bytes of 2,000,000\n"
    )
    main(["clear"])
    assert capsys.readouterr().out == (
        f"{store.folder}: removed 1 entries, {usage.bytes:,} bytes\n"
    )
    assert store.usage() == Usage(0, 0)
    environment.setenv("LORA_INIT_CACHE", "off")
    main([])
    assert capsys.readouterr().out == "the cache is off (LORA_INIT_CACHE)\n"
