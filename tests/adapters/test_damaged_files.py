"""Damaged files are refused by name, before the base changes; scratch files are removed."""

import copy
import json
import os
import random
import signal
import stat
import time
import warnings
from pathlib import Path

import peft
import pytest
import torch
from measures import assert_unchanged, snapshot
from models import llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_init import LoraConfig, LoraModel, get_peft_model
from lora_init.files import write_atomically
from lora_init.weights.checkpoint import OriginalWeights

pytestmark = pytest.mark.sampled(4)

WEIGHTS = "adapter_model.safetensors"
SETTINGS = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def save(kind, folder):
    if kind == "peft":
        model = peft.get_peft_model(llama(), peft.LoraConfig(**SETTINGS, modules_to_save=["norm"]))
    else:
        method, variant = kind.split()
        extra = {"modules_to_save": ["norm"], "rank_pattern": {"q_proj": 3}}
        extra["use_dora"] = variant == "dora"
        config = LoraConfig(**SETTINGS, init_lora_weights=method, **extra)
        model = get_peft_model(llama(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


KINDS = ["peft", "kaiming dora", "pissa plain", "loftq plain"]


@pytest.fixture(scope="module", params=KINDS)
def files(request, tmp_path_factory):
    """The bytes of the files of an intact folder."""
    folder = tmp_path_factory.mktemp("good")
    save(request.param, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md"}


@pytest.fixture
def load(tmp_path):
    """Load changed files: refused with the base unchanged, or accepted with the right shapes."""
    original = llama()

    def call(files):
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        base = copy.deepcopy(original)
        before = snapshot(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = LoraModel.from_pretrained(base, tmp_path)
            except (ValueError, FileNotFoundError) as error:
                message = str(error)
                model = None
        if model is None:
            assert str(tmp_path) in message
            assert_unchanged(base, before)
            return None
        for layer in model.layers.values():
            assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
            assert layer.lora_A.shape[0] == layer.lora_B.shape[1]
        return model

    return call


JUNK = [
    None, True, 0, -1, 3.5, float("nan"), 10**400, "", "x", "[", "é\u2028", [], {}, [1], ["q_proj"],
    {"a": 1}, {"q_proj": None}, {"name": "pissa"}, {"name": 5}, [None],
]  # fmt: skip


def paths(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*path, key))


def mutated(value, draw):
    """A copy of a JSON object in which one part is changed, removed or renamed."""
    path = draw.choice(list(paths(value))[1:])
    value = copy.deepcopy(value)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    action = draw.choice(["set", "set", "delete", "rename"])
    if action == "set":
        parent[path[-1]] = draw.choice(JUNK)
    elif action == "delete" or isinstance(parent, list):
        del parent[path[-1]]
    else:
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
    return value


def with_header(data, change, folder):
    """The bytes of a safetensors file with another header."""
    path = folder / "rewritten"
    path.write_bytes(data)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata.get("lora_init", "{}")) or {"format_version": 1}
    save_file(load_file(path), path, metadata=metadata | {"lora_init": json.dumps(change(header))})
    data = path.read_bytes()
    path.unlink()
    return data


def flipped(data, draw):
    """Bytes with one flipped bit, mostly in the header; sometimes the end is missing."""
    data = bytearray(data)
    place = draw.randrange(min(len(data), draw.choice([64, 3000, len(data)])))
    data[place] ^= 1 << draw.randrange(8)
    return bytes(data[: draw.randrange(len(data))] if draw.random() < 0.2 else data)


@pytest.mark.parametrize("part", ["configuration", "header", "bits"])
def test_a_mutated_folder_is_refused_by_name_or_right(part, files, load, tmp_path):
    draw = random.Random(part)
    weights = next(name for name in files if name.endswith(".safetensors"))
    for _ in range(10):
        changed = dict(files)
        if part == "configuration":
            values = mutated(json.loads(files["adapter_config.json"]), draw)
            changed["adapter_config.json"] = json.dumps(values).encode()
        elif part == "header":
            changed[weights] = with_header(
                files[weights], lambda header: mutated(header, draw), tmp_path
            )
        else:
            name = draw.choice(list(files))
            changed[name] = flipped(files[name], draw)
        load(changed)


@pytest.mark.parametrize("header", [*JUNK, {"format_version": 1}], ids=repr)
def test_an_invalid_header_is_refused(header, load, tmp_path):
    save("pissa plain", tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    files[WEIGHTS] = with_header(files[WEIGHTS], lambda _: header, tmp_path)
    assert load(files) is None


def test_a_checksum_that_is_missing_is_not_a_key_error(load, tmp_path):
    """A flipped bit in a layer's name."""
    save("loftq plain", tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    name = "lora_init_adapter.safetensors"

    def change(header):
        checksums = header["checksums"]
        checksums[next(iter(checksums)) + "x"] = checksums.pop(next(iter(checksums)))
        return header

    assert load(files | {name: with_header(files[name], change, tmp_path)}) is not None


def test_deep_json_in_the_header_is_a_named_error(load, tmp_path):
    save("pissa plain", tmp_path)
    path = tmp_path / WEIGHTS
    deep = {"format": "pt", "lora_init": '{"a":' * 100_000 + "1" + "}" * 100_000}
    save_file(load_file(path), path, metadata=deep)
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        LoraModel.from_pretrained(llama(), tmp_path)


# -- where files are ---------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/tmp/secret.safetensors", "a/../../b"])
def test_an_index_stays_in_its_folder(shard, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"up.weight": torch.ones(2, 2)}, tmp_path / "secret.safetensors")
    index = {"weight_map": {"up.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside of its folder"):
        OriginalWeights(folder)


def test_links_in_a_cache_of_downloads_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"up.weight": torch.ones(2, 2)}, tmp_path / "blobs" / "0a")
    (tmp_path / "snapshot" / "model-1.safetensors").symlink_to(Path("..") / "blobs" / "0a")
    index = {"weight_map": {"up.weight": "model-1.safetensors"}}
    (tmp_path / "snapshot" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert OriginalWeights(tmp_path / "snapshot").shape("up") == (2, 2)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027, 0o002])
def test_files_have_the_mode_that_the_umask_gives(mask, tmp_path):
    before = os.umask(mask)
    try:
        save("pissa plain", tmp_path)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask}


def writer(folder):
    """The id of a process that has begun to write the adapter and then waits forever."""
    reader, end = os.pipe()

    def write(path):
        path.write_text("half")
        os.write(end, b"!")
        time.sleep(60)

    process = os.fork()
    if not process:
        try:
            write_atomically(folder / WEIGHTS, write)
        finally:
            os._exit(1)
    assert os.read(reader, 1) == b"!"
    os.close(reader)
    os.close(end)
    return process


def test_the_next_save_removes_the_scratch_files_of_killed_writers(tmp_path):
    killed, running = writer(tmp_path), writer(tmp_path)
    try:
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        old, young = (tmp_path / f".{WEIGHTS}.{name}" for name in ("old", "young"))
        for path in (old, young, tmp_path / ".other"):
            path.write_text("half")
        os.utime(old, (time.time() - 10**6,) * 2)
        save("pissa plain", tmp_path)
        left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
        assert {young.name, ".other"} < left
        assert len(left) == 3  # and the scratch file of the writer that still runs
        assert any(f"-{running}-" in name for name in left)
    finally:
        os.kill(running, signal.SIGKILL)
        os.waitpid(running, 0)
