"""A calibration's file: whole, damaged, or something else."""

from __future__ import annotations

import copy
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_init import Calibration, LoraConfig, WithLoss, calibrate, get_peft_model
from lora_init.calibration import file as calibration_file
from lora_init.calibration.file import CHECKSUM_KEY, HEADER_KEY


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))


def config(method) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=method)


def collected(*methods) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(20, 12, generator=generator) for _ in range(2)]
    return calibrate(
        network(),
        [config(method) for method in methods],
        WithLoss(batches, lambda model, batch: model(batch).square().mean()),
    )


KINDS = {
    "moments": lambda: collected("eva", {"name": "corda", "corda_method": "kpm"}),
    "gradient": lambda: collected("lora_ga", "corda"),
}


@pytest.fixture(params=KINDS)
def saved(request, tmp_path):
    path = tmp_path / "found.safetensors"
    KINDS[request.param]().save(path)
    return path


def read(path) -> tuple[dict, dict]:
    """The header's texts and the tensors."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])["__metadata__"], load_file(path)


def rewritten(path, change, *, sealed: bool) -> None:
    """Change the JSON and the tensors; `sealed` writes a fitting checksum."""
    header, tensors = read(path)
    metadata = json.loads(header[HEADER_KEY])
    change(metadata, tensors)
    header[HEADER_KEY] = json.dumps(metadata)
    if sealed:
        header[CHECKSUM_KEY] = calibration_file._checksum(header[HEADER_KEY], tensors)
    save_file(tensors, path, metadata=header)


def test_a_file_gives_back_every_bit(saved):
    found = Calibration.load(saved)
    found.save(saved.with_name("again"))
    first, second = (read(saved.with_name(name)) for name in (saved.name, "again"))
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_statistics_start_the_same_adapter_from_memory_and_from_a_file(tmp_path):
    """Whatever the header's length, which moves the tensors within the file."""
    found = collected("lora_ga", "corda", "eva")
    for length in (0, 8, 40):
        found.fingerprints = {"x" * length: ""}
        found.save(tmp_path / "found")
        read = Calibration.load(tmp_path / "found")
        for method in ("lora_ga", "corda", "eva"):
            one, other = (
                get_peft_model(network(), config(method), calibration=each)
                for each in (found, read)
            )
            for name, layer in one.layers.items():
                assert torch.equal(layer.lora_A, other.layers[name].lora_A)
                assert torch.equal(layer.lora_B, other.layers[name].lora_B)


DAMAGE = {
    "empty": lambda data: b"",
    "truncated header": lambda data: data[:20],
    "truncated tensors": lambda data: data[:-4],
    "longer": lambda data: data + b"\0",
    "flipped bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
    "JSON": lambda data: b"{}",
    "deep JSON": lambda data: struct.pack("<Q", 10**5) + b"[" * 10**5,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_name(saved, damage):
    saved.write_bytes(DAMAGE[damage](saved.read_bytes()))
    with pytest.raises(ValueError, match=r"found\.safetensors is damaged"):
        Calibration.load(saved)


@pytest.mark.parametrize("obstacle", ["fifo", "folder", "link to a folder"])
def test_something_else_than_a_file_is_refused_by_name(tmp_path, obstacle):
    path = tmp_path / "found.safetensors"
    make = {
        "fifo": os.mkfifo,
        "folder": os.mkdir,
        "link to a folder": lambda path: path.symlink_to("."),
    }
    make[obstacle](path)
    with pytest.raises(ValueError, match=r"found\.safetensors is not a file"):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        Calibration.load(tmp_path / "missing")


def test_every_wrong_type_in_the_json_is_refused(saved):
    """At every path of the JSON, every value of another type."""
    tensors, metadata = calibration_file.read(saved)
    for path in paths(metadata):
        if path == ("format_version",):
            continue
        for value in (None, True, -1, 10**400, float("nan"), "x", [], {}, [[]], {"a": []}):
            changed = copy.deepcopy(metadata)
            place = changed
            for step in path[:-1]:
                place = place[step]
            unchanged, place[path[-1]] = place[path[-1]] is value, value
            if unchanged or fits(path, value):
                Calibration.from_tensors(tensors, changed)
            else:
                with pytest.raises(ValueError, match=r"must be|missing|refers|unknown|has|is no"):
                    Calibration.from_tensors(tensors, changed)


def fits(path, value) -> bool:
    """Whether this is another value of the same meaning."""
    if path[-1] == "ignore_label":
        return value is None or type(value) is int
    if path[-1] == "smallest":
        return value is True
    if path[-1] in ("layers", "fingerprints"):
        return value == {}
    return path == ("requests",) and value == []


def paths(value, before=()):
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for step, inner in entries:
        yield (*before, step)
        if isinstance(inner, dict | list):
            yield from paths(inner, (*before, step))


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_another_dtype_is_refused(saved, dtype):
    intact = saved.read_bytes()
    for name in load_file(saved):

        def change(_, tensors, name=name):
            tensors[name] = tensors[name].to(dtype)

        saved.write_bytes(intact)
        rewritten(saved, change, sealed=True)
        with pytest.raises(ValueError, match=f"found.*damaged.*'{name}' is torch"):
            Calibration.load(saved)


SHAPES = {
    "transposed and cut": lambda tensor: tensor.mT[..., 1:].contiguous(),
    "one dimension more": lambda tensor: tensor[None],
    "flat": lambda tensor: tensor.flatten()[None, None],
    "NaN": lambda tensor: torch.full_like(tensor, torch.nan),
    "infinite": lambda tensor: torch.full_like(tensor, torch.inf),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tensor_of_another_shape_or_not_finite_is_refused(saved, shape):
    intact = saved.read_bytes()
    for name, tensor in load_file(saved).items():
        if tensor.ndim < 2 and shape == "transposed and cut":
            continue

        def change(_, tensors, name=name):
            tensors[name] = SHAPES[shape](tensors[name])

        saved.write_bytes(intact)
        rewritten(saved, change, sealed=True)
        if name.endswith("gradient") and shape == "transposed and cut":
            continue  # any matrix is a gradient of some weight: see the next test
        with pytest.raises(ValueError, match=rf"found.*damaged.*'{name[0]}\.\w+'"):
            Calibration.load(saved)


def test_a_gradient_of_another_shape_does_not_fit_the_model(tmp_path):
    collected("lora_ga").save(tmp_path / "found")

    def change(_, tensors):
        for name in tensors:
            tensors[name] = tensors[name][:-1].clone()

    rewritten(tmp_path / "found", change, sealed=True)
    with pytest.raises(ValueError, match="the gradient of '0' has shape"):
        get_peft_model(
            network(), config("lora_ga"), calibration=Calibration.load(tmp_path / "found")
        )


@pytest.mark.parametrize("change", ["missing", "surplus", "renamed"])
def test_a_tensor_that_is_missing_or_unknown_is_refused(saved, change):
    def edit(_, tensors):
        name = next(iter(tensors))
        if change != "missing":
            tensors["7.mean"] = tensors[name].clone()
        if change != "surplus":
            del tensors[name]

    rewritten(saved, edit, sealed=True)
    with pytest.raises(ValueError, match=r"found.*damaged.*is (missing|unknown)"):
        Calibration.load(saved)


def test_an_unsealed_change_is_refused(saved):
    rewritten(saved, lambda metadata, _: metadata.update(tokens=7), sealed=False)
    with pytest.raises(ValueError, match="checksum"):
        Calibration.load(saved)


@pytest.mark.parametrize("version", [2, 0, "1", True, None, 1.0])
def test_another_version_is_refused(saved, version):
    rewritten(saved, lambda metadata, _: metadata.update(format_version=version), sealed=True)
    with pytest.raises(ValueError, match=r"found.*is not a calibration of this version"):
        Calibration.load(saved)
