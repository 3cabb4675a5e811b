"""Checksums of quantized bases: equal on every device, and those of older files still count."""

import hashlib
import json
import warnings

import numpy as np
import peft
import pytest
import torch
from models import llama
from safetensors import safe_open
from safetensors.torch import save_file
from simulated_device import simulated_cuda

from lora_init import (
    LoraConfig,
    LoraModel,
    get_peft_model,
    initialize_peft_model,
    load_peft_checkpoint,
    save_peft_model,
)
from lora_init.cache import hash
from lora_init.cache.hash import block_sums
from lora_init.factors import Replacement
from lora_init.injection.checksum import base_checksum, checksum
from lora_init.quantization import Quantizer

SETTINGS = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
UNIFORM = {"name": "loftq", "quantizer": "uniform"}
FILE = "lora_init_adapter.safetensors"


def plain_sums(tensor):
    """The formula of the module, in Python's integers."""
    words = np.frombuffer(tensor.contiguous().view(torch.uint8).numpy().tobytes(), "<i4")
    rows = hash._multipliers(hash.WORDS).tolist()
    size = len(rows[0])
    sums = []
    for start in range(0, len(words), size):
        block = words[start : start + size].tolist()
        sums += [sum(a * w for a, w in zip(row, block, strict=False)) % 2**64 for row in rows]
    return np.array(sums, np.uint64).tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_block_sums_are_their_formula(dtype, monkeypatch):
    monkeypatch.setattr(hash, "WORDS", 64)
    monkeypatch.setattr(hash, "BLOCK_BYTES", 256)
    tensor = (50 * torch.randn(37, 52)).to(dtype)
    assert block_sums(tensor) == plain_sums(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("chunk", [256, 1 << 25])
def test_block_sums_do_not_depend_on_layout_or_device(dtype, chunk, monkeypatch):
    monkeypatch.setattr(hash, "CHUNK_BYTES", chunk)
    tensor = (50 * torch.rand(35, 31)).to(dtype)
    expected = block_sums(tensor)
    assert block_sums(tensor.T.contiguous().T) == expected
    shifted = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(35, 31)
    assert block_sums(shifted) == expected
    with simulated_cuda():
        assert block_sums(tensor.cuda()) == expected


def test_block_sums_tell_values_apart():
    zeros = torch.zeros(300, 70)
    different = [zeros, -zeros]
    for index in (0, 8191, 8192, 20999):
        one = zeros.clone()
        one.view(-1)[index] = 1e-45
        different.append(one)
    assert len({block_sums(tensor) for tensor in different}) == len(different)
    assert block_sums(torch.zeros(0, 3)) == b""


def test_a_checksum_is_that_of_the_stored_values():
    weight = torch.randn(20, 30)
    assert checksum(weight).startswith("m64:")
    assert checksum(weight) == checksum(weight.double())
    assert checksum(weight) != checksum(weight.bfloat16())
    assert checksum(weight) == checksum(weight.T.contiguous().T)


def float32_checksum(weight):
    """What older versions wrote."""
    return hashlib.sha256(weight.float().contiguous().numpy().tobytes()).hexdigest()[:16]


def header_of(path):
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


def write_older(folder, replacements, weights):
    """Give a file the checksums of an older version."""
    tensors, metadata = header_of(folder / FILE)
    header = json.loads(metadata["lora_init"])
    assert all(text.startswith("m64:") for text in header["checksums"].values())
    for name, (replacement, scaling) in replacements.items():
        quantizer, residual = replacement.quantizer, replacement.residual(weights[name], scaling)
        values = quantizer.dequantize(quantizer.quantize(residual, averages_in=torch.float32))
        assert not torch.equal(values, quantizer.roundtrip(residual))  # else nothing is tested
        header["checksums"][name] = float32_checksum(values)
    save_file(tensors, folder / FILE, metadata=metadata | {"lora_init": json.dumps(header)})


def started(under_peft):
    """A started model, and the recipes of its bases."""
    base = llama()
    weights = {
        name: base.get_submodule(name).weight.detach().clone()
        for name, _ in base.named_modules()
        if name.endswith(("q_proj", "v_proj"))
    }
    if not under_peft:
        model = get_peft_model(base, LoraConfig(**SETTINGS, init_lora_weights=UNIFORM))
        scalings = {name: layer.scaling for name, layer in model.layers.items()}
        made = model._injection.replacements
        return model, {name: (made[name], scalings[name]) for name in made}, weights
    model = peft.get_peft_model(base, peft.LoraConfig(**SETTINGS))
    initialize_peft_model(model, "loftq", options={"quantizer": "uniform"})
    starts = {name: model.base_model.model.get_submodule(name).base_layer for name in weights}
    found = {name: base.initial_factors for name, base in starts.items()}
    return model, {name: (s.replacement, s.scaling) for name, s in found.items()}, weights


def loaded(under_peft, folder):
    if not under_peft:
        return LoraModel.from_pretrained(llama(), folder)
    model = peft.get_peft_model(llama(), peft.LoraConfig(**SETTINGS))
    load_peft_checkpoint(model, folder)
    return model


@pytest.mark.parametrize("under_peft", [False, True], ids=["ours", "PEFT"])
@pytest.mark.parametrize("older", [False, True], ids=["new file", "older file"])
def test_a_file_for_the_same_codes_loads_without_a_warning(under_peft, older, tmp_path):
    model, replacements, weights = started(under_peft)
    (save_peft_model if under_peft else LoraModel.save_pretrained)(model, tmp_path)
    if older:
        write_older(tmp_path, replacements, weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*some codes")
        loaded(under_peft, tmp_path)
    tensors, metadata = header_of(tmp_path / FILE)
    text = metadata["lora_init"].replace('"m64:', '"m64:0') if not older else None
    if text:
        save_file(tensors, tmp_path / FILE, metadata=metadata | {"lora_init": text})
        with pytest.warns(UserWarning, match="some codes"):
            loaded(under_peft, tmp_path)


QUANTIZERS = [Quantizer(), Quantizer(double=True), Quantizer("uniform", 2)]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.name)
def test_the_checksum_of_an_older_file_counts_for_equal_codes_alone(quantizer):
    weight, factor = torch.randn(64, 640), torch.randn(2, 640)
    plain = Replacement(quantizer, factor, torch.zeros(64, 2))
    former = quantizer.dequantize(quantizer.quantize(weight, averages_in=torch.float32))
    stored = plain.base(weight, 1.0)
    text = float32_checksum(former)
    older = Replacement(quantizer, factor, plain.lora_B, text)
    assert base_checksum(older, weight, 1.0, stored) == text
    moved = weight.clone()
    moved[0, :64] *= 1.5  # another scale, or another code
    assert base_checksum(older, moved, 1.0, plain.base(moved, 1.0)).startswith("m64:")
    assert base_checksum(plain, weight, 1.0, stored) == checksum(stored)
