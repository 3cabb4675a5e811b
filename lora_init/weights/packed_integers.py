"""Small unsigned integers that quantizers pack into 32-bit words."""

from __future__ import annotations

import torch
from jaxtyping import Int16, Int32
from torch import Tensor

WORD = 32  # bits in a packed word


def unpacked(words: Int32[Tensor, "rows words"], bits: int) -> Int16[Tensor, "rows integers"]:
    """The integers of each row, the one in the lowest bits of a word first.

    With 3 bits, 32 integers fill three words, and two of them cross the border of a word: the row
    is one sequence of bits.

    Args:
        words: the number of bits in a row is a multiple of `bits`.
        bits: the bits of an integer, at most 8.
    """
    mask = (1 << bits) - 1
    start = torch.arange(0, WORD * words.shape[1], bits, device=words.device)
    if WORD % bits == 0:
        shifts = start[: WORD // bits].to(torch.int32)
        return (words[:, :, None] >> shifts & mask).flatten(1).to(torch.int16)
    word, offset = start // WORD, start % WORD
    wide = words.to(torch.int64) & 0xFFFFFFFF
    # The next word holds the high bits of an integer that crosses a border.
    following = torch.cat([wide[:, 1:], wide.new_zeros(len(wide), 1)], dim=1)
    both = wide[:, word] | (following[:, word] << WORD)
    return (both >> offset & mask).to(torch.int16)
