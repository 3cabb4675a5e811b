"""Checksums of quantized bases, which adapter files hold.

| form | value |
|---|---|
| ``m64:`` and 16 digits | `lora_init.cache.hash` of the stored weight, on its own device |
| 16 digits | SHA-256 of the weight as float32; older files have it |

Older versions also took the means of a quantizer's scales in float32, where the order of the sum
decides the last bit. A base that is equal but for those bits has the codes of the file.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.cache.hash import block_sums
from lora_init.factors import Replacement

PREFIX = "m64:"


def checksum(weight: Tensor) -> str:
    """The checksum of a stored weight; the same on every device."""
    # A float64 module holds the float32 values that a float32 module would.
    stored = weight.float() if weight.dtype == torch.float64 else weight
    return PREFIX + hashlib.sha256(block_sums(stored)).hexdigest()[:16]


def base_checksum(
    replacement: Replacement,
    original: Float[Tensor, "out in"],
    scaling: float,
    stored: Float[Tensor, "out in"],
) -> str:
    """The checksum of a replaced base; the file's own text where the base is the file's.

    Args:
        replacement: what made the base, with the checksum of the file that it comes from.
        original: the weight from before.
        scaling: of the adapter.
        stored: the base as its module holds it.
    """
    expected = replacement.checksum
    if expected is None or expected.startswith(PREFIX):
        return checksum(stored)
    if _float32_checksum(stored) == expected:
        return expected
    if replacement.quantizer.averages:
        residual = replacement.residual(original, scaling)
        quantizer = replacement.quantizer
        former = quantizer.quantize(residual, averages_in=torch.float32)
        values = quantizer.dequantize(former).to(stored.dtype)
        same_codes = torch.equal(former.codes, quantizer.quantize(residual).codes)
        if same_codes and _float32_checksum(values) == expected:
            return expected
    return checksum(stored)


def _float32_checksum(weight: Tensor) -> str:
    values = weight.float().contiguous().cpu().numpy().tobytes()
    return hashlib.sha256(values).hexdigest()[:16]
