"""One entry of the cache: its content and its file format."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lora_init.cache.keys import digest

RANK = 0
"""A part of the checksum and of the file name, so that entries of older versions stay valid."""


@dataclass(frozen=True)
class Entry:
    """A stored result: tensors on the CPU, and metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def bytes_of(path: Path, limit: int) -> bytes:
    """Read a whole file into memory.

    The file is not memory-mapped, so it cannot change after its checksum was verified.

    Raises:
        ValueError: the path is not a regular file, or the file is larger than `limit`.
    """
    try:
        found = path.stat()
    except OSError as error:
        if path.is_symlink():
            raise ValueError("a broken link") from error
        raise
    if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
        raise ValueError("not an entry")
    return path.read_bytes()


def serialized(key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The bytes of an entry's file, with a checksum over its whole content."""
    # Copies: safetensors refuses tensors that share one storage.
    plain = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    text = json.dumps(dict(metadata))
    return save(plain, {"metadata": text, "checksum": digest(key, RANK, text, plain)})


def deserialized(key: str, data: bytes) -> Entry:
    """Parse an entry and verify its checksum.

    Raises:
        ValueError: the checksum differs. Damaged data may also raise any error of the parser.
    """
    # Copies: BLAS rounds differently if memory is not aligned as torch aligns it.
    tensors = {name: tensor.clone() for name, tensor in load(data).items()}
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
    text = header["metadata"]
    if header["checksum"] != digest(key, RANK, text, tensors):
        raise ValueError("wrong checksum")
    return Entry(tensors, json.loads(text))
