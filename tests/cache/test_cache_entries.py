"""Round trips and damage."""

from __future__ import annotations

import json
import random
import struct
import warnings

import pytest
import torch
from stores import LARGE, files, some_tensors

from lora_init.cache import Cache, key


def test_a_text_that_is_no_key_is_refused(store):
    with pytest.raises(ValueError, match="key='../mine' is not supported"):
        store.get("../mine")
    with pytest.raises(ValueError, match="must be 64 hexadecimal digits"):
        store.put("ab", some_tensors(), {})


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
    store.put(name, some_tensors(), {"a": 1})
    (path,) = files(store)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="a damaged file in the cache"):
        assert store.get(name) is None
    assert files(store) == []
    store.put(name, some_tensors(), {"a": 1})
    assert torch.equal(store.get(name).tensors["U"], some_tensors()["U"])


def test_another_entrys_file_is_a_miss(store):
    mine, theirs = key("svd", 1, "mine"), key("svd", 1, "theirs")
    store.put(theirs, some_tensors(), {})
    (path,) = files(store)
    target = store._path(mine)
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    with pytest.warns(UserWarning, match="damaged"):
        assert store.get(mine) is None


def test_every_single_damaged_byte_is_found(store):
    """Never another exception, never a wrong value, wherever the damage is."""
    name = key("svd", 1)
    store.put(name, {"S": torch.tensor([1.0, 2.0])}, {"a": 1})
    (path,) = files(store)
    intact = path.read_bytes()
    draw = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at in range(len(intact)):
            for byte in {intact[at] ^ 1, intact[at] ^ 128, draw.randrange(256)} - {intact[at]}:
                path.write_bytes(intact[:at] + bytes([byte]) + intact[at + 1 :])
                entry = store.get(name)
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
