"""Checksums of quantized base weights, which adapter files contain.

| form | value |
|---|---|
| ``m64:`` and 16 digits | `lora_init.cache.hash` of the stored weight, computed on its device |
| 16 digits | SHA-256 of the weight as float32; used in older files |

Older versions also averaged a quantizer's scales in float32, where the last bit depends on the
summation order. A base that differs only in those bits has the same codes and is accepted.
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
    """The checksum of a stored weight; equal on every device."""
    # A float64 module holds the same values as a float32 module would.
    stored = weight.float() if weight.dtype == torch.float64 else weight
    return PREFIX + hashlib.sha256(block_sums(stored)).hexdigest()[:16]


def base_checksum(
    replacement: Replacement,
    original: Float[Tensor, "*experts out in"],
    scaling: float,
    stored: Float[Tensor, "*experts out in"],
) -> str:
    """The checksum of a replaced base, or the file's checksum if the base matches the file.

    Args:
        replacement: the recipe of the base, with the checksum from its file.
        original: the weight before replacement.
        scaling: the adapter's scaling.
        stored: the base as its module stores it.
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
