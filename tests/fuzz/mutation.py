"""Mutations of one file in a folder: of JSON, of safetensors, of bytes, and of the place itself.

Each draws from a `random.Random`, so that a seed gives the same mutation in every process.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = Any
Draw = random.Random

REGEXES = [
    "(.*)*x!", "(a+)+$", "(.|.)*?!", r"(\w+\.?)+#", r"([a-z]+)*\d\d\d", "(.*.*)*=", "(((.+)+)+)+%",
    "[", "(?P<a>", "*", r"\K", "(?<=.*)a", "a{999999999}", "(?s:.*)*\\Z!", ".*query", "",
]  # fmt: skip
PATTERNS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern",
            "modules_to_save")  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 10**400, 1.5, -0.0, 1e308,
    float("nan"), float("inf"), float("-inf"), "", "x", "0", "1", "true", "all-linear", "kaiming",
    "pissa", "none", "../..", "/etc/passwd", "a" * 10_000, "\u2028", "\ud800", "\U0001f600", "é",
    "\x00", "{}", "AAAA", "AAA", [], {}, [None], [[]], {"": 1}, {"a": {}}, [1] * 100, ["query"],
    {"query": 3}, {"query": "3"}, {"query": -1}, {"query": 1e9}, [float("nan")],
    *REGEXES, *({regex: 4} for regex in REGEXES),
]  # fmt: skip
DTYPES = [
    "BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2",
    "C64", "U16", "U64", "F4", "F8_E8M0", "F6_E2M3", "XX", "", 5, None,
]  # fmt: skip


def mutate(folder: Path, names: list[str], draw: Draw, seal: Callable[[dict, bytes], None]) -> str:
    """Change one file of the folder, or what is in its place; returns what was done.

    Args:
        names: of the files.
        seal: gives a changed header checksums that fit; half of the header mutations ask for it.
    """
    name = draw.choice(names)
    path = folder / name
    if draw.random() < 0.1:
        place = draw.choice(list(PLACES))
        PLACES[place](path)
        return f"{name}: {place}"
    data = path.read_bytes()
    kinds: dict[str, Callable[[bytes, Draw], bytes]] = dict(BYTES)
    if name.endswith((".json", ".jsonl")):
        kinds = JSON_KINDS | kinds
    if name.endswith(".safetensors"):
        header = {
            kind: lambda data, draw, change=change: with_header(data, draw, change, seal)
            for kind, change in HEADERS.items()
        }
        kinds = header | kinds
    weights = [1 if kind in BYTES else 3 for kind in kinds]
    (kind,) = draw.choices(list(kinds), weights)
    try:
        path.write_bytes(kinds[kind](data, draw))
    except (ValueError, LookupError, TypeError):  # a second change of what the first one broke
        path.write_bytes(_flipped(data, draw))
        return f"{name}: flipped bits"
    return f"{name}: {kind}"


# Something else in the file's place.


def _replaced(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


PLACES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "folder": _replaced(Path.mkdir),
    "fifo": _replaced(os.mkfifo),
    "link to nothing": _replaced(lambda path: path.symlink_to("nothing")),
    "link to itself": _replaced(lambda path: path.symlink_to(path.name)),
    "link to a folder": _replaced(lambda path: path.symlink_to(".")),
    "link to a device": _replaced(lambda path: path.symlink_to("/dev/null")),
}


# Any bytes.


def _flipped(data: bytes, draw: Draw) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


BYTES: dict[str, Callable[[bytes, Draw], bytes]] = {
    "flipped bits": _flipped,
    "truncated": lambda data, draw: data[: draw.randrange(len(data) + 1)],
    "empty": lambda data, draw: b"",
    "longer": lambda data, draw: data + draw.randbytes(draw.randrange(1, 64)),
    "zeros": lambda data, draw: bytes(len(data)),
    "noise": lambda data, draw: draw.randbytes(len(data)),
    "Git LFS pointer": lambda data, draw: b"version https://git-lfs.github.com/spec/v1\nsize 1\n",
    "HTML": lambda data, draw: b"<html>not found</html>",
    "pickle": lambda data, draw: b"\x80\x02}q\x00.",
}


# JSON.


def places(value: Json, before: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON value."""
    entries = list(value.items()) if isinstance(value, dict) else []
    entries = list(enumerate(value)) if isinstance(value, list) else entries
    found = []
    for step, inner in entries[:60]:
        found += [(*before, step), *places(inner, (*before, step))]
    return found


def changed(value: Json, draw: Draw) -> Json:
    """The value with one change somewhere within."""
    found = places(value)
    if not found or draw.random() < 0.03:
        return draw.choice(VALUES)
    patterns = [path for path in found if path[-1] in PATTERNS]
    chosen = bool(patterns) and draw.random() < 0.15
    path = draw.choice(patterns if chosen else found)
    place = value
    for step in path[:-1]:
        place = place[step]
    last = path[-1]
    action = draw.random()
    if chosen:
        regex = draw.choice(REGEXES)
        place[last] = draw.choice((regex, [regex], {regex: draw.choice((2, 3, 4))}))
    elif action < 0.7:
        place[last] = draw.choice(VALUES)
    elif action < 0.8:
        del place[last]
    elif action < 0.9 and isinstance(place, dict):
        place[draw.choice(["unknown", "", "a.b", "r", "\u2028", *REGEXES])] = draw.choice(VALUES)
    elif isinstance(place, dict):
        place[f"{last}x"] = place.pop(last)
    else:
        place.append(draw.choice(VALUES))
    return value


def dumped(value: Json) -> bytes:
    return json.dumps(value).encode()


def _json_change(data: bytes, draw: Draw) -> bytes:
    """One change; of JSON lines, in one of them."""
    try:
        return dumped(changed(json.loads(data), draw))
    except ValueError:
        lines = data.splitlines()
        number = draw.randrange(len(lines))
        lines[number] = dumped(changed(json.loads(lines[number]), draw))
        return b"\n".join(lines) + b"\n"


def _deep(data: bytes, draw: Draw) -> bytes:
    depth = draw.choice((200, 2_000, 100_000))
    opened, closed = draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inner = opened * depth + b"1" + closed * depth
    return inner if draw.random() < 0.5 or b":" not in data else data.replace(b":", b":" + inner, 1)


def _duplicate(data: bytes, draw: Draw) -> bytes:
    try:
        keys = list(json.loads(data))
    except ValueError:
        return data + data
    if not keys or b"{" not in data:
        return data
    entry = json.dumps(str(draw.choice(keys))) + ": " + json.dumps(draw.choice(VALUES)) + "}"
    return data.rstrip()[:-1] + b", " + entry.encode()


JSON_KINDS: dict[str, Callable[[bytes, Draw], bytes]] = {
    "JSON change": _json_change,
    "JSON change twice": lambda data, draw: _json_change(_json_change(data, draw), draw),
    "deep JSON": _deep,
    "duplicate key": _duplicate,
    "byte order mark": lambda data, draw: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data, draw: data.decode().encode("utf-16"),
    "latin-1": lambda data, draw: data.replace(b'"', b'"\xe9', 1),
    "number": lambda data, draw: data.replace(b"1", draw.choice((b"1e999", b"9" * 5000)), 1),
}


# The header of a safetensors file.


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header's JSON and the tensors' bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Json, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + payload


def with_header(
    data: bytes,
    draw: Draw,
    change: Callable[[dict, Draw], Json | None],
    seal: Callable[[dict, bytes], None],
) -> bytes:
    header, payload = split(data)
    result = change(header, draw)
    if result is not None:
        return joined(result, payload)
    if draw.random() < 0.5:
        seal(header, payload)
    return joined(header, payload)


def _tensor(header: dict, draw: Draw) -> dict[str, Any]:
    return header[draw.choice([name for name in header if name != "__metadata__"])]


def _dtype(header: dict, draw: Draw) -> None:
    _tensor(header, draw)["dtype"] = draw.choice(DTYPES)


def _dtype_of_the_same_size(header: dict, draw: Draw) -> None:
    """A file that is valid and holds something else."""
    tensor = _tensor(header, draw)
    alike = {"F32": ["I32", "U32"], "F64": ["I64", "C64", "U64"], "F16": ["BF16", "I16"]}
    tensor["dtype"] = draw.choice(alike.get(tensor["dtype"], ["I8", "U8"]))


def _halved(header: dict, draw: Draw) -> None:
    """Four bytes an entry read as two entries of two bytes, or as an eight-byte one."""
    tensor = _tensor(header, draw)
    if tensor["shape"]:
        tensor["dtype"], factor = draw.choice((("F16", 2), ("BF16", 2), ("U8", 4), ("BOOL", 4)))
        tensor["shape"][-1] *= factor


def _shape(header: dict, draw: Draw) -> None:
    shape = _tensor(header, draw)["shape"]
    action = draw.choice(("reversed", "flat", "one more", "wrong", "huge", "negative"))
    if action == "reversed":
        shape.reverse()
    elif action == "flat":
        size = 1
        for length in shape:
            size *= length
        shape[:] = [size]
    elif action == "one more":
        shape.insert(draw.randrange(len(shape) + 1), 1)
    elif shape:
        wrong = {"wrong": draw.randrange(1, 100), "huge": 2**62, "negative": -1}
        shape[draw.randrange(len(shape))] = wrong[action]


def _offsets(header: dict, draw: Draw) -> None:
    offsets = _tensor(header, draw)["data_offsets"]
    offsets[draw.randrange(2)] = draw.choice((0, 1, -1, 2**63, offsets[0] + 4, offsets[1] - 4))


def _swapped(header: dict, draw: Draw) -> None:
    """Two names change places: valid, and perhaps of the same shape."""
    names = [name for name in header if name != "__metadata__"]
    one, other = draw.choice(names), draw.choice(names)
    header[one], header[other] = header[other], header[one]


def _renamed(header: dict, draw: Draw) -> None:
    name = draw.choice([name for name in header if name != "__metadata__"])
    new = draw.choice((
        name + "x", name[1:], "", "module." + name, "_orig_mod." + name, name + ".default",
        name.replace("lora_A", "lora_B"), name.replace(".", "/"), "\u2028", name.upper(),
    ))  # fmt: skip
    header[new] = header.pop(name)


def _dropped(header: dict, draw: Draw) -> None:
    del header[draw.choice(list(header))]


def _metadata(header: dict, draw: Draw) -> None:
    """Within the JSON that a header's text holds, or of the texts themselves."""
    texts = header.get("__metadata__", {})
    if not texts:
        header["__metadata__"] = {"format": "np"}
        return
    name = draw.choice(sorted(texts))
    if texts[name].startswith('{"') and draw.random() < 0.85:
        texts[name] = json.dumps(changed(json.loads(texts[name]), draw))
    else:
        texts[name] = draw.choice(("", "{}", "[]", "null", "1", "x", "[" * 50_000, "NaN"))


def _whole(header: dict, draw: Draw) -> Json:
    return draw.choice((
        [], 1, {}, b"{", b"[" * 1000, b'{"a":' * 5000, json.dumps(header).encode()[:-1],
        b"\xff" * 64, json.dumps(header).encode() + b"}", changed(header, draw),
    ))  # fmt: skip


HEADERS: dict[str, Callable[[dict, Draw], Json | None]] = {
    "dtype": _dtype,
    "dtype of the same size": _dtype_of_the_same_size,
    "dtype and shape": _halved,
    "shape": _shape,
    "offsets": _offsets,
    "swapped tensors": _swapped,
    "renamed tensor": _renamed,
    "dropped tensor": _dropped,
    "metadata": _metadata,
    "metadata twice": lambda header, draw: _metadata(header, draw) or _metadata(header, draw),
    "whole header": _whole,
}


def restore(folder: Path, intact: dict[str, bytes]) -> None:
    """The folder as it was, whatever is in it now."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in intact.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
