"""Keys and fingerprints: what differs has another, what is equal the same everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import simulated_device
import torch
from simulated_device import simulated_cuda
from stores import LARGE

from lora_init.cache import Cache, fingerprint, key, keys


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (7,), (0, 3), (3, 0), (5, 3), (1, 300), (300, 1), (2, 3, 50)]
)
def test_fingerprint_does_not_depend_on_the_number_of_threads(monkeypatch, shape):
    monkeypatch.setattr(keys, "CHUNK_BYTES", 128)
    tensor = torch.rand(shape)
    found = set()
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.add(fingerprint(tensor))
    assert len(found) == 1


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
    assert fingerprint(weight.cuda()) != fingerprint(weight)  # results differ in their last bits
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


def test_a_fingerprint_copies_sums_alone_from_a_cuda_device(monkeypatch):
    """In the calling thread: another one's stream may read memory before it is written."""
    weight, copied = torch.randn(500, 300), []
    original = simulated_device.moved

    def moved(tensor, where, *settings, **options):
        if simulated_device.place(tensor) != where == simulated_device.CPU:
            copied.append(tensor.nbytes)
        return original(tensor, where, *settings, **options)

    monkeypatch.setattr(simulated_device, "moved", moved)
    monkeypatch.setattr(keys, "ThreadPoolExecutor", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(keys, "CHUNK_BYTES", 1000)
    with simulated_cuda():
        fingerprint(weight.cuda())
    assert 0 < sum(copied) <= weight.nbytes / 500


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fingerprint_tells_values_dtypes_and_shapes_apart(device):
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
    with simulated_cuda():
        assert len({fingerprint(one.to(device)) for one in different}) == len(different)


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
    with pytest.raises(TypeError, match="cache key: .* Convert it"):
        key("svd", 1, part)
