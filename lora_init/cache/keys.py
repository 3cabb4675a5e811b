"""Cache keys: SHA-256 over everything that a result depends on.

Each part is first converted to a canonical form, in which different parts always differ. Scalars
are JSON values (1, 1.0, True and "1" differ), lists and tuples are arrays. Everything else is an
object with the name of its type, such as ``{"tensor": <fingerprint>}``.

All values of a tensor are hashed. `lora_init.weights.fingerprint` instead samples a weight, to
recognize a base model after rounding.
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
"""Bytes per chunk: large enough to hide the overhead, small enough for the cache of a core.
Fingerprints depend on it."""


def key(algorithm: str, version: int, *parts: Any) -> str:
    """The key of one result.

    Args:
        algorithm: the algorithm that computed the result, such as "svd".
        version: the version of that algorithm. Raise it whenever the results change.
        parts: everything else that the result depends on: None, booleans, numbers, strings, bytes,
            tensors, dataclasses, and mappings, lists and tuples of these. The order of a mapping
            does not matter.

    Returns:
        64 hexadecimal digits, the same in every process and on every platform.

    Raises:
        TypeError: a part has another type, or a tensor cannot be hashed.
    """
    return digest("lora_init", algorithm, version, parts)


def digest(*parts: Any) -> str:
    """SHA-256 of the parts' canonical form, as 64 hexadecimal digits."""
    return hashlib.sha256(_text([_canonical(part) for part in parts]).encode()).hexdigest()


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values; it does not depend on the strides.

    Chunks of whole rows are hashed in parallel threads, then their digests are hashed. hashlib and
    torch release the interpreter lock. Each thread copies at most one chunk of a strided tensor.

    On a CUDA device, block sums are computed first (see `lora_init.cache.hash`). SHA-256 then
    hashes the sums, so no weight is copied to the host. A tensor therefore has different
    fingerprints on a CPU and on a CUDA device.

    Args:
        tensor: a tensor of any dtype, shape, strides and device.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: the tensor is on the meta device (as offloaded weights are), or it is a subclass
            that wraps other tensors.
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
    # Do not call numpy(): torch would then treat the memory as numpy's from then on.
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
        f"cache key: the part {part!r} of type {type(part).__name__} is not supported: must be "
        "None, a boolean, a number, a string, bytes, a tensor, a dataclass, or a mapping, list or "
        "tuple of these. Convert it."
    )


def _text(canonical: Any) -> str:
    return json.dumps(canonical, sort_keys=True, separators=(",", ":"))
