"""An exact hash of a tensor's bytes, computed on the tensor's own device.

The bytes are split into blocks of `WORDS` 32-bit words. The hash of a block consists of two sums
over its words w. Each sum has its own random 64-bit multipliers a:

    h = sum_i a_i w_i  mod 2^64

Integer sums are exact in any order, so every device computes the same value. Two different blocks
have equal sums with a probability of at most 2^-66. Only the sums (16 bytes per block) are copied
to the host.

Source: Carter & Wegman, "Universal classes of hash functions", JCSS 18 (1979); Lemire & Kaser,
"Strongly universal string hashing is fast", The Computer Journal 57 (2014), for words and a
modulus of these sizes.
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
"""Bytes of rows that are hashed together. All block boundaries and hashes depend on it."""
CPU_BLOCKS = 8
"""Blocks that a CPU sums at a time, so that the products fit into the cache of a core."""


def block_sums(tensor: Tensor) -> bytes:
    """Two 64-bit sums for each block of the tensor's bytes, in the order of its rows.

    The sums do not depend on shape and dtype. The last block is padded with zeros.

    Args:
        tensor: a tensor of any dtype, strides and device.
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
    """The bytes of some rows as int32 blocks (blocks, WORDS); the last one is zero-padded."""
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
    """Fixed random numbers (2, words): the same in every process and version.

    This is an array, since a tensor would keep the default device of the first caller.
    """
    stream = hashlib.shake_256(b"lora_init multilinear").digest(2 * 8 * words)
    return np.frombuffer(stream, "<i8").astype(np.int64).reshape(2, words)
