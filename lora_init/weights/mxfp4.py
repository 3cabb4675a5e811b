"""MXFP4: 4-bit floats, two in a byte, with one power of two for each block of 32.

w = value[code] · 2^(scale - 127). The first of two values is in the low half of its byte.

Source: the OCP Microscaling Formats specification 1.0; the layout of gpt-oss in transformers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of the codes 0 to 7 (E2M1); the codes 8 to 15 have their negatives."""

BIAS = 127  # of the exponents (E8M0)


def mxfp4_values(
    codes: UInt8[Tensor, "*experts out blocks bytes"], scales: UInt8[Tensor, "*experts out blocks"]
) -> Float[Tensor, "*experts out in"]:
    """The dequantized matrices in float32.

    Args:
        codes: two codes in a byte, such as ``gate_up_proj_blocks``.
        scales: the exponents of the blocks plus 127, such as ``gate_up_proj_scales``.
    """
    table = torch.tensor(VALUES, dtype=torch.float32, device=codes.device)
    table = torch.cat([table, -table])
    pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    exponents = scales.to(torch.int32) - BIAS
    return torch.ldexp(table[pairs.long()], exponents[..., None]).flatten(-2)
