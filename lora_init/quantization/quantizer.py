"""Block quantisers: what LoftQ and its kin put in place of the base weight.

A `Quantizer` is a deterministic map, weight -> values on a grid, described by four settings, in
plain torch, on any device. All but "int8" work on blocks of the flattened (row-major) weight:

    code_i = argmin_c |w_i / scale - table[c]|,    value_i = scale * table[code_i]

| kind | table | scale | source |
|---|---|---|---|
| nf4 | QLoRA's 16 NormalFloat values | max abs w | Dettmers et al. 2023, bitsandbytes |
| fp4 | ± 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 | max abs w | bitsandbytes |
| nf2 | 4 NormalFloat values: -1, 0, 0.338, 1 | max abs w | Li et al. 2023, LoftQ's code |
| uniform | 2^bits evenly spaced values, -1 to 1 | mean w + 2.5 std w | LoftQ's code |
| int8 | -127 … 127, divided by 127 | max abs w of the row | Dettmers et al. 2022, bitsandbytes |

On gaussian weights the relative error ``‖W - Q‖ / ‖W‖`` is about 0.092 for nf4/64.

`double` quantises the scales of nf4 and fp4 too, as QLoRA's double quantisation does: less their
mean, in blocks of 256, to a table of 256 values of graded precision (Dettmers et al. 2021).

    scale_b = mean + table[code_b] * largest,    largest = max_b |scale_b - mean| of 256 blocks

Codes, scales and values of nf4, fp4 and int8 are those of bitsandbytes 0.50 on a CPU, to the bit;
with `double` they are within a rounding of the mean.

Deviations:
    - uniform: LoftQ's two programs differ. This is the one for language models (blocks, a table);
      the GLUE one clips the whole matrix at mean ± 2 std. In blocks whose mean is below -1.5 std,
      where its scale vanishes or turns negative, we take abs(mean) + 2.5 std.
    - nf4, fp4: bitsandbytes 0.50 on a CPU with AVX-512 restarts the blocks at each row when it
      dequantises: where the row length is even and no multiple of the block, its values belong to
      other blocks' scales. Ours, and those of its other kernels, do not.
    - nf4, fp4, double: its CUDA kernels may choose the other neighbour on a tie, and they search
      the table of the scales without rounding to 2^16 steps first, as its CPU kernel and ours do.
    - double: the mean of the scales is taken in float64 and rounded once. bitsandbytes sums it in
      float32, where the last bit depends on the device and on the number of threads.
    - uniform: mean and std are taken in float64, too.
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
from lora_init.quantization.codebooks import FP4_ASCENDING, Grid, dynamic_table, midpoints, table_of

# Keep the reciprocal finite, so that a block of zeros becomes zeros and not NaN: 1 / scale, with
# bitsandbytes' bound, and 127 / scale.
SMALLEST_SCALE = 1e-38
SMALLEST_ROW_SCALE = 1e-36
BITS = {"nf4": (4,), "fp4": (4,), "nf2": (2,), "uniform": (2, 4, 8), "int8": (8,)}

DOUBLE_BLOCK = 256  # scales that share a scale
DOUBLE_STEPS = 2**16 - 1


@dataclass(frozen=True)
class NestedScale:
    """Scales quantised in their turn: ``scale = offset + table[codes] * scale of their block``."""

    codes: Tensor
    scale: Float[Tensor, " outer_blocks"]
    offset: Float[Tensor, ""]


@dataclass(frozen=True)
class Quantized:
    """A quantised weight.

    Attributes:
        codes: (out, in), one code per element: uint8 indices into the table; for "int8" the int8
            values themselves, as bitsandbytes stores them.
        scale: float32, one per block, or one per row for "int8": what the values are made with.
        quantizer: the map that made it.
        nested: where `scale` comes from under double quantisation.
    """

    codes: Tensor
    scale: Float[Tensor, " blocks"]
    quantizer: Quantizer
    nested: NestedScale | None = None


@dataclass(frozen=True)
class Quantizer:
    """A deterministic map from a weight to its quantised values.

    Attributes:
        kind: "nf4", "fp4", "nf2", "uniform" or "int8".
        bits: 4 for nf4 and fp4, 2 for nf2, 2, 4 or 8 for uniform, 8 for int8.
        block_size: elements that share a scale; "int8", which scales rows, does not read it.
        double: quantise the scales as well (nf4 and fp4 only).

    Raises:
        ValueError: an option, or the pair of kind and bits, is not allowed.

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
            raise ValueError(f"kind={self.kind!r} is unknown; allowed are {', '.join(BITS)}.")
        if isinstance(self.bits, bool) or self.bits not in BITS[self.kind]:
            allowed = BITS[self.kind]
            raise ValueError(
                f"bits={self.bits!r} is not allowed for kind={self.kind!r}; "
                f"set bits={' or '.join(map(str, allowed))}."
            )
        size = self.block_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"block_size={size!r} is not allowed; give an integer of at least 1, such as 64."
            )
        if not isinstance(self.double, bool) or (self.double and self.kind not in ("nf4", "fp4")):
            raise ValueError(
                f"double={self.double!r} is not allowed for kind={self.kind!r}; set double=False, "
                "or double=True with kind nf4 or fp4."
            )

    @property
    def name(self) -> str:
        """A short label: "nf4/64", "nf4/64+double", "nf2/64", "uniform2/64", "int8"."""
        if self.kind == "int8":
            return "int8"
        bits = str(self.bits) if self.kind == "uniform" else ""
        return f"{self.kind}{bits}/{self.block_size}{'+double' if self.double else ''}"

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain values for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quantizer:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key is not a field, or a value is not allowed.
        """
        allowed = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(allowed))
        if unknown:
            raise ValueError(
                f"Quantizer has no setting {', '.join(unknown)}; allowed are {', '.join(allowed)}."
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
        """Return the nearest codes; on a tie the lower one (int8: the even one).

        Args:
            weight: (out, in), any float dtype; computed in float32.
            averages_in: dtype of means and deviations, which are rounded to float32 once. In
                float64 the order of a device's sums does not change them; float32 is only for bases
                of older files.

        Raises:
            ValueError: `weight` is not a 2-D float tensor.
        """
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                f"weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; allowed is a "
                "float matrix (out, in)."
            )
        weight = weight.float()
        if self.kind == "int8":
            scale = weight.abs().amax(dim=1)
            steps = weight * (127.0 / scale.clamp(min=SMALLEST_ROW_SCALE))[:, None]
            codes = torch.round(steps).to(torch.int8)
            return Quantized(codes, scale, self)
        ascending = torch.tensor(FP4_ASCENDING, dtype=torch.uint8, device=weight.device)
        grid = grid_of(self.kind, self.bits).to(weight.device)
        codes, scales = [], []
        for blocks in _blocks(weight.reshape(-1), self.block_size):
            if self.kind == "uniform":
                scale = _deviation_scale(blocks.to(averages_in)).float()
            else:
                scale = blocks.abs().amax(dim=1)
            divisor = scale.clamp(min=SMALLEST_SCALE)[:, None]
            # As bitsandbytes does, whose rounding this is: full blocks are multiplied by the
            # reciprocal, a short last one is divided.
            full = blocks.shape[1] == self.block_size
            normalised = blocks * (1.0 / divisor) if full else blocks / divisor
            found = grid.find(normalised)
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
            ValueError: another quantiser made `quantized`.
        """
        if quantized.quantizer != self:
            raise ValueError(
                f"quantized was made by {quantized.quantizer.name}, not by {self.name}; "
                "call quantized.quantizer.dequantize."
            )
        codes, scale = quantized.codes, quantized.scale
        if self.kind == "int8":
            return codes.float() * scale[:, None] * (1.0 / 127.0)
        table = table_of(self.kind, self.bits).to(codes.device)
        return expanded(codes, scale, table, self.block_size).reshape(codes.shape)

    def roundtrip(self, weight: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out in"]:
        """``dequantize(quantize(weight))``: the values a model with this weight computes with."""
        if weight.ndim > 2:  # a scale may depend on all of one weight
            return torch.stack([self.roundtrip(one) for one in weight])
        return self.dequantize(self.quantize(weight))


@cache
def grid_of(kind: str, bits: int) -> Grid:
    """Of the midpoints between the values that the codes stand for, ascending."""
    table = table_of(kind, bits)
    return Grid.of(midpoints(table[list(FP4_ASCENDING)] if kind == "fp4" else table))


def expanded(
    codes: Tensor, scale: Float[Tensor, " blocks"], table: Float[Tensor, " codes"], size: int
) -> Float[Tensor, " values"]:
    """Return ``table[codes] * scale`` in float32, each scale serving the next `size` codes."""
    table, flat = table.float(), codes.reshape(-1)
    values = matrix.empty(flat.shape, torch.float32, flat.device)
    first = 0
    for part, blocks in zip(_blocks(flat, size), _blocks(values, size), strict=True):
        torch.index_select(table, 0, part.reshape(-1).int(), out=blocks.view(-1))
        blocks.mul_(scale[first : first + len(blocks), None])
        first += len(blocks)
    return values


def _nested(scale: Float[Tensor, " blocks"], averages_in: torch.dtype) -> NestedScale:
    """Double quantisation of the scales, with the rounding of bitsandbytes' CPU kernel."""
    offset = scale.mean(dtype=averages_in).float()
    boundaries = midpoints(dynamic_table().to(scale.device))
    codes, largest = [], []
    for blocks in _blocks(scale - offset, DOUBLE_BLOCK):
        outer = blocks.abs().amax(dim=1)
        normalised = blocks * (1.0 / outer.clamp(min=SMALLEST_SCALE))[:, None]
        # It does not search the table for each value but looks the nearest of 2^16 steps up.
        steps = ((normalised.clamp(-1, 1) + 1) * 0.5 * DOUBLE_STEPS + 0.5).floor()
        found = torch.bucketize(steps * (2 / DOUBLE_STEPS) - 1, boundaries, out_int32=True)
        found = found.masked_fill((outer == 0)[:, None], 0)
        codes.append(found.to(torch.uint8).reshape(-1))
        largest.append(outer)
    return NestedScale(torch.cat(codes), torch.cat(largest), offset)


def _blocks(flat: Tensor, size: int) -> Iterator[Tensor]:
    """Views of `flat`: the full blocks as (blocks, size), then what is left as one short block.

    On a CPU no more than a part of a large weight at a time (see `lora_init.linalg.matrix`).
    """
    full = flat.numel() - flat.numel() % size
    part = matrix.rows_together(size) * size
    together = part if flat.device.type == "cpu" else max(1, full)
    for first in range(0, full, together):
        yield flat[first : min(full, first + together)].view(-1, size)
    if full < flat.numel():
        yield flat[full:].view(1, -1)


def _deviation_scale(blocks: Float[Tensor, "blocks size"]) -> Float[Tensor, " blocks"]:
    """LoftQ's clipping point ``mean + 2.5 std`` (unbiased), see the module's deviations."""
    mean = blocks.mean(dim=1)
    deviation = blocks.std(dim=1) if blocks.shape[1] > 1 else torch.zeros_like(mean)
    return torch.where(mean < -1.5 * deviation, mean.abs(), mean) + 2.5 * deviation
