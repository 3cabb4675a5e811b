"""Block quantizers: deterministic maps from a weight to values on a grid.

All kinds but "int8" work on blocks of the flattened (row-major) weight:

    code_i = argmin_c |w_i / scale - table[c]|,    value_i = scale * table[code_i]

| kind | table | scale | source |
|---|---|---|---|
| nf4 | QLoRA's 16 NormalFloat values | max abs w | Dettmers et al. 2023, bitsandbytes |
| fp4 | ± 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 | max abs w | bitsandbytes |
| nf2 | 4 NormalFloat values: -1, 0, 0.338, 1 | max abs w | Li et al. 2023, LoftQ's code |
| uniform | 2^bits evenly spaced values, -1 to 1 | mean w + 2.5 std w | LoftQ's code |
| int8 | -127 … 127, divided by 127 | max abs w of the row | Dettmers et al. 2022, bitsandbytes |

`double` also quantizes the scales of nf4 and fp4, as QLoRA's double quantization does. Their mean
is subtracted, and blocks of 256 use a table of 256 values (Dettmers et al. 2021):

    scale_b = mean + table[code_b] * largest,    largest = max_b |scale_b - mean| of 256 blocks

Codes, scales and values of nf4, fp4 and int8 equal those of bitsandbytes 0.50 on a CPU, to the bit.
With `double` they are within a rounding of the mean.

Deviations:
    - uniform: LoftQ's two programs differ. This is the one for language models (blocks, a table).
      The GLUE program clips the whole matrix at mean ± 2 std. In blocks whose mean is below
      -1.5 std, where its scale vanishes or turns negative, we use abs(mean) + 2.5 std.
    - nf4, fp4: with AVX-512, bitsandbytes 0.50 restarts the blocks at each row when it dequantizes.
      If the row length is even and not a multiple of the block, its values then use the scales of
      other blocks. Ours, and those of its other kernels, do not.
    - nf4, fp4, double: its CUDA kernels may choose the other neighbor on a tie. They also search
      the table of the scales without first rounding to 2^16 steps, as its CPU kernel and ours do.
    - uniform, double: means and deviations are computed in float64 and rounded once. bitsandbytes
      uses float32, where the last bit depends on the device and the number of threads.
    - int8: bitsandbytes' Linear8bitLt rounds the weight to float16 first; we start from float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import matrix
from lora_init.linalg.precision import wide
from lora_init.quantization.codebooks import (
    FP4_ASCENDING,
    Grid,
    dynamic_table,
    midpoints,
    table_of,
)

# The reciprocals 1 / scale (with bitsandbytes' bound) and 127 / scale stay finite, so that a block
# of zeros becomes zeros and not NaN.
SMALLEST_SCALE = 1e-38
SMALLEST_ROW_SCALE = 1e-36
BITS = {"nf4": (4,), "fp4": (4,), "nf2": (2,), "uniform": (2, 4, 8), "int8": (8,)}

DOUBLE_BLOCK = 256  # scales that share a scale
DOUBLE_STEPS = 2**16 - 1


@dataclass(frozen=True)
class NestedScale:
    """Quantized scales: ``scale = offset + table[codes] * scale of their block``."""

    codes: Tensor
    scale: Float[Tensor, " outer_blocks"]
    offset: Float[Tensor, ""]


@dataclass(frozen=True)
class Quantized:
    """A quantized weight.

    Attributes:
        codes: (out, in), one code per element: uint8 indices into the table; for "int8" the int8
            values themselves, as bitsandbytes stores them.
        scale: float32, one per block, or one per row for "int8".
        quantizer: the map that made it.
        nested: the codes of `scale` under double quantization.
    """

    codes: Tensor
    scale: Float[Tensor, " blocks"]
    quantizer: Quantizer
    nested: NestedScale | None = None


@dataclass(frozen=True)
class Quantizer:
    """A deterministic map from a weight to its quantized values.

    Attributes:
        kind: "nf4", "fp4", "nf2", "uniform" or "int8".
        bits: 4 for nf4 and fp4, 2 for nf2, 2, 4 or 8 for uniform, 8 for int8.
        block_size: elements that share a scale; "int8" scales rows and ignores it.
        double: quantize the scales as well (nf4 and fp4 only).

    Raises:
        ValueError: an option, or the pair of kind and bits, is not supported.

    Examples:
        >>> Quantizer().name
        'nf4/64'
        >>> Quantizer().roundtrip(torch.tensor([[2.0, -1.0, 0.1, 0.0]]))
        tensor([[ 2.0000, -1.0501,  0.1592,  0.0000]])
    """

    kind: str = "nf4"
    bits: int = 4
    block_size: int = 64
    double: bool = False

    def __post_init__(self) -> None:
        if self.kind not in BITS:
            raise ValueError(
                f"kind={self.kind!r} is not supported: must be one of {', '.join(BITS)}."
            )
        if isinstance(self.bits, bool) or self.bits not in BITS[self.kind]:
            allowed = " or ".join(map(str, BITS[self.kind]))
            raise ValueError(
                f"bits={self.bits!r} is not supported for kind={self.kind!r}: must be {allowed}."
            )
        size = self.block_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"block_size={size!r} is not supported: must be an integer of at least 1, "
                "such as 64."
            )
        if not isinstance(self.double, bool) or (self.double and self.kind not in ("nf4", "fp4")):
            raise ValueError(
                f"double={self.double!r} is not supported for kind={self.kind!r}: must be False, "
                "or True with kind nf4 or fp4."
            )

    @property
    def name(self) -> str:
        """A short label: "nf4/64", "nf4/64+double", "nf2/64", "uniform2/64", "int8"."""
        if self.kind == "int8":
            return "int8"
        bits = str(self.bits) if self.kind == "uniform" else ""
        return f"{self.kind}{bits}/{self.block_size}{'+double' if self.double else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quantizer:
        """Return the quantizer of `to_dict`.

        Raises:
            ValueError: a key is not a field, or a value is not supported.
        """
        allowed = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(allowed))
        if unknown:
            raise ValueError(
                f"Quantizer has no setting {', '.join(unknown)}: must be one of "
                f"{', '.join(allowed)}."
            )
        return cls(**values)

    @property
    def averages(self) -> bool:
        """Whether scales depend on a mean, and so on its rounding."""
        return self.kind == "uniform" or self.double

    @torch.no_grad()
    def quantize(
        self, weight: Float[Tensor, "out in"], *, averages_in: torch.dtype = torch.float64
    ) -> Quantized:
        """Return the nearest codes. On a tie the lower one is chosen (int8: the even one).

        Args:
            weight: (out, in), any float dtype; computed in float32.
            averages_in: dtype of means and deviations, which are rounded to float32 once. In
                float64 the order of a device's sums does not matter. Use float32 only for bases of
                older files.

        Raises:
            ValueError: `weight` is not a 2-D float tensor.
        """
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                f"weight with shape {tuple(weight.shape)} and dtype {weight.dtype} is not "
                "supported: must be a float matrix (out, in)."
            )
        weight = weight.float()
        if self.kind == "int8":
            scale = weight.abs().amax(dim=1)
            steps = weight * (127.0 / scale.clamp(min=SMALLEST_ROW_SCALE))[:, None]
            return Quantized(torch.round(steps).to(torch.int8), scale, self)
        ascending = torch.tensor(FP4_ASCENDING, dtype=torch.uint8, device=weight.device)
        grid = _grid_of(self.kind, self.bits).to(weight.device)
        codes, scales = [], []
        for blocks in _blocks(weight.reshape(-1), self.block_size):
            if self.kind == "uniform":
                scale = _deviation_scale(_cast(blocks, averages_in)).float().to(blocks.device)
            else:
                scale = blocks.abs().amax(dim=1)
            divisor = scale.clamp(min=SMALLEST_SCALE)[:, None]
            # bitsandbytes' rounding: full blocks are multiplied by the reciprocal, a short last
            # block is divided.
            full = blocks.shape[1] == self.block_size
            normalized = blocks * (1.0 / divisor) if full else blocks / divisor
            found = grid.find(normalized)
            found = ascending[found] if self.kind == "fp4" else found.to(torch.uint8)
            codes.append(found.reshape(-1))
            scales.append(scale)
        found, scale, nested = torch.cat(codes).reshape(weight.shape), torch.cat(scales), None
        if self.double:
            nested = _nested(scale, averages_in)
            table = dynamic_table().to(scale.device)
            scale = expanded(nested.codes, nested.scale, table, DOUBLE_BLOCK) + nested.offset
        return Quantized(found, scale, self, nested)

    @torch.no_grad()
    def dequantize(self, quantized: Quantized) -> Float[Tensor, "out in"]:
        """Return the float32 values that the codes stand for.

        Raises:
            ValueError: another quantizer made `quantized`.
        """
        if quantized.quantizer != self:
            raise ValueError(
                f"quantized was made by {quantized.quantizer.name}, not by {self.name}. "
                "Call quantized.quantizer.dequantize."
            )
        codes, scale = quantized.codes, quantized.scale
        if self.kind == "int8":
            return codes.float() * scale[:, None] * (1.0 / 127.0)
        table = table_of(self.kind, self.bits).to(codes.device)
        return expanded(codes, scale, table, self.block_size).reshape(codes.shape)

    def roundtrip(self, weight: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out in"]:
        """Return ``dequantize(quantize(weight))``: the values that a quantized model uses."""
        if weight.ndim > 2:  # a scale may depend on all of one weight
            return torch.stack([self.roundtrip(one) for one in weight])
        return self.dequantize(self.quantize(weight))


def expanded(
    codes: Tensor, scale: Float[Tensor, " blocks"], table: Float[Tensor, " codes"], size: int
) -> Float[Tensor, " values"]:
    """Return ``table[codes] * scale`` in float32, where each scale covers `size` codes."""
    table, flat = table.float(), codes.reshape(-1)
    values = matrix.empty(flat.shape, torch.float32, flat.device)
    first = 0
    for part, blocks in zip(_blocks(flat, size), _blocks(values, size), strict=True):
        torch.index_select(table, 0, part.reshape(-1).int(), out=blocks.view(-1))
        blocks.mul_(scale[first : first + len(blocks), None])
        first += len(blocks)
    return values


@cache
def _grid_of(kind: str, bits: int) -> Grid:
    """Return the grid of the midpoints between the values of the codes, ascending."""
    table = table_of(kind, bits)
    return Grid.of(midpoints(table[list(FP4_ASCENDING)] if kind == "fp4" else table))


def _nested(scale: Float[Tensor, " blocks"], averages_in: torch.dtype) -> NestedScale:
    """Quantize the scales, with the rounding of bitsandbytes' CPU kernel."""
    offset = _cast(scale, averages_in).mean().float().to(scale.device)
    boundaries = midpoints(dynamic_table().to(scale.device))
    codes, largest = [], []
    for blocks in _blocks(scale - offset, DOUBLE_BLOCK):
        outer = blocks.abs().amax(dim=1)
        normalized = blocks * (1.0 / outer.clamp(min=SMALLEST_SCALE))[:, None]
        # That kernel looks up the nearest of 2^16 steps instead of searching for each value.
        steps = ((normalized.clamp(-1, 1) + 1) * 0.5 * DOUBLE_STEPS + 0.5).floor()
        found = torch.bucketize(steps * (2 / DOUBLE_STEPS) - 1, boundaries, out_int32=True)
        found = found.masked_fill((outer == 0)[:, None], 0)
        codes.append(found.to(torch.uint8).reshape(-1))
        largest.append(outer)
    return NestedScale(torch.cat(codes), torch.cat(largest), offset)


def _blocks(flat: Tensor, size: int) -> Iterator[Tensor]:
    """Yield views of `flat`: full blocks as (blocks, size), then the rest as one short block.

    On a CPU, each view is a part of a large weight that fits the caches.
    """
    full = flat.numel() - flat.numel() % size
    part = matrix.rows_together(size) * size
    together = part if flat.device.type == "cpu" else max(1, full)
    for first in range(0, full, together):
        yield flat[first : min(full, first + together)].view(-1, size)
    if full < flat.numel():
        yield flat[full:].view(1, -1)


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in a dtype; float64 may be on another device."""
    return wide(values) if dtype == torch.float64 else values.to(dtype)


def _deviation_scale(blocks: Float[Tensor, "blocks size"]) -> Float[Tensor, " blocks"]:
    """Return LoftQ's clipping point ``mean + 2.5 std`` (unbiased); see the deviations above."""
    mean = blocks.mean(dim=1)
    deviation = blocks.std(dim=1) if blocks.shape[1] > 1 else torch.zeros_like(mean)
    return torch.where(mean < -1.5 * deviation, mean.abs(), mean) + 2.5 * deviation
