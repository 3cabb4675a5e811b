"""Keys: SHA-256 over everything that a result depends on, and over nothing else.

A part is brought into a canonical form first, in which no two different parts look alike: scalars
as JSON (1, 1.0, True and "1" differ), lists and tuples as arrays, and everything else as an object
with the name of its kind, e.g. ``{"tensor": <fingerprint>}``.

Tensors are hashed whole. The samples of `lora_init.weights.fingerprint` tell one base model from
another
after rounding; a key must tell any two tensors apart, whatever differs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_init.cache.hash import block_sums

CHUNK_BYTES = 1 << 20
"""Large enough that a chunk's overhead does not count, small enough to stay in a core's cache.
Fingerprints depend on it."""


def key(algorithm: str, version: int, *parts: Any) -> str:
    """The key of one result.

    Args:
        algorithm: what computed it, e.g. "svd"; results of different algorithms never meet.
        version: of that algorithm's code, raised whenever its results change.
        parts: what else the result depends on: None, booleans, numbers, strings, bytes, tensors,
            dataclasses, and mappings, lists and tuples of these. A mapping's order does not count.

    Returns:
        64 hexadecimal digits, the same in every process and on every platform.

    Raises:
        TypeError: a part of another type, or a tensor that cannot be hashed.
    """
    return digest("lora_init", algorithm, version, parts)


def digest(*parts: Any) -> str:
    """SHA-256 of the parts' canonical form, as 64 hexadecimal digits."""
    return hashlib.sha256(_text([_canonical(part) for part in parts]).encode()).hexdigest()


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values, however they are laid out.

    The values are cut into chunks of whole rows, and the digests of the chunks are hashed: so
    torch's threads share the work (hashlib and torch let go of the interpreter's lock), and of a
    strided tensor no more than a chunk a thread is copied. SHA-256 and not BLAKE2, because today's
    processors have instructions for it.

    A CUDA device sums its values up first (see `lora_init.cache.hash`), and SHA-256 hashes the
    sums: no weight is copied to the host, and no other thread reads it while it may be written to.
    So a tensor's fingerprint on a CPU differs from its fingerprint on a CUDA device.

    Args:
        tensor: of any dtype, shape, strides and device.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: the tensor has no memory with its values: on the meta device, as offloaded
            weights are, or a subclass around other tensors.
    """
    if tensor.is_meta or is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"cache key: a {type(tensor).__name__} on {tensor.device} has no values to hash; pass "
            "a plain tensor on a CPU or an accelerator"
        )
    described = _text([str(tensor.dtype), list(tensor.shape)]).encode()
    if tensor.device.type == "cuda":
        return hashlib.sha256(b"".join([described, b"sums", block_sums(tensor)])).hexdigest()
    rows = tensor.detach().flatten(0, -2) if tensor.ndim > 1 else tensor.detach().reshape(-1)
    row_bytes = rows.element_size() * (rows.shape[1] if rows.ndim > 1 else 1)
    chunks = rows.split(max(1, CHUNK_BYTES // max(1, row_bytes)))
    threads = min(torch.get_num_threads(), len(chunks))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            digests = list(pool.map(_chunk_digest, chunks))
    else:
        digests = [_chunk_digest(chunk) for chunk in chunks]
    return hashlib.sha256(b"".join([described, *digests])).hexdigest()


def _chunk_digest(chunk: Tensor) -> bytes:
    values = chunk.contiguous().cpu()
    if not values.numel():
        return hashlib.sha256().digest()
    # Not by numpy(), after which torch takes the weight's memory for numpy's for good.
    return hashlib.sha256((ctypes.c_ubyte * values.nbytes).from_address(values.data_ptr())).digest()


def _canonical(part: Any) -> Any:
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, list | tuple):
        return [_canonical(item) for item in part]
    if isinstance(part, bytes):
        return {"bytes": hashlib.sha256(part).hexdigest()}
    if isinstance(part, Tensor):
        return {"tensor": fingerprint(part)}
    if isinstance(part, Mapping):
        pairs = [[_canonical(name), _canonical(value)] for name, value in part.items()]
        return {"mapping": sorted(pairs, key=_text)}
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return {"dataclass": [type(part).__qualname__, _canonical(values)]}
    raise TypeError(
        f"cache key: {part!r} is a {type(part).__name__}; a part is None, a boolean, a number, a "
        "string, bytes, a tensor, a dataclass, or a mapping, list or tuple of these; convert it"
    )


def _text(canonical: Any) -> str:
    return json.dumps(canonical, sort_keys=True, separators=(",", ":"))
