"""An exact hash of a tensor's bytes, computed on the tensor's own device.

The bytes are cut into blocks of `WORDS` words of 32 bits. The hash of a block is two sums over its
words w, each with other random 64-bit multipliers a:

    h = sum_i a_i w_i  mod 2^64

Integer sums are exact in any order, so every device finds the same value. Two different blocks
have the same two sums with a probability of at most 2^-66. Only the sums, 16 bytes a block, are
copied to the host.

Source: Carter & Wegman, "Universal classes of hash functions", JCSS 18 (1979); Lemire & Kaser,
"Strongly universal string hashing is fast", The Computer Journal 57 (2014), for words and a modulus
of these sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

WORDS = 1 << 13
BLOCK_BYTES = 4 * WORDS
CHUNK_BYTES = 1 << 25
"""Rows that are hashed together. Block boundaries, and so all hashes, depend on it."""
CPU_BLOCKS = 8
"""Blocks that a CPU sums at a time, so that the products stay in a core's cache."""


def block_sums(tensor: Tensor) -> bytes:
    """Two 64-bit sums of each block of the tensor's values, in the order of its rows.

    Shape and dtype are not hashed, nor are zeros that fill up the last block.

    Args:
        tensor: of any dtype, strides and device.
    """
    rows = tensor.detach().flatten(0, -2) if tensor.ndim > 1 else tensor.detach().reshape(-1)
    if not rows.numel():
        return b""
    multipliers = torch.from_numpy(_multipliers(WORDS)).to(rows.device)
    row_bytes = rows.element_size() * (rows.shape[1] if rows.ndim > 1 else 1)
    sums = [
        torch.stack([(words * one).sum(1) for one in multipliers], dim=1)
        for chunk in rows.split(max(1, CHUNK_BYTES // row_bytes))
        for words in _blocks(chunk)
    ]
    return torch.cat(sums).cpu().numpy().tobytes()


def _blocks(chunk: Tensor) -> Iterator[Tensor]:
    """The bytes of some rows as (blocks, WORDS) of int32; zeros fill up the last block."""
    values = chunk.contiguous().reshape(-1).view(torch.uint8)
    full = len(values) - len(values) % BLOCK_BYTES
    if full:
        aligned = values[:full] if values.storage_offset() % 4 == 0 else values[:full].clone()
        blocks = aligned.view(torch.int32).view(-1, WORDS)
        yield from blocks.split(CPU_BLOCKS if blocks.device.type == "cpu" else len(blocks))
    if full < len(values):
        last = values.new_zeros(BLOCK_BYTES)
        last[: len(values) - full] = values[full:]
        yield last.view(torch.int32).view(1, WORDS)


@cache
def _multipliers(words: int) -> np.ndarray:
    """(2, words) fixed random numbers: the same in every process and version.

    An array, because a tensor would keep the default device and mode of its first caller.
    """
    stream = hashlib.shake_256(b"lora_init multilinear").digest(2 * 8 * words)
    return np.frombuffer(stream, "<i8").astype(np.int64).reshape(2, words)
