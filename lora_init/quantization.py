"""Block quantisers: what LoftQ and its kin put in place of the base weight.

A `Quantizer` is a deterministic map, weight -> values on a grid, described by three numbers, in
plain torch, on any device. All but "int8" work on blocks of the flattened (row-major) weight:

    code_i = argmin_c |w_i / scale - table[c]|,    value_i = scale * table[code_i]

| kind | table | scale | source |
|---|---|---|---|
| nf4 | QLoRA's 16 NormalFloat values | max abs w | Dettmers et al. 2023, bitsandbytes |
| nf2 | 4 NormalFloat values: -1, 0, 0.338, 1 | max abs w | Li et al. 2023, LoftQ's code |
| uniform | 2^bits evenly spaced values, -1 to 1 | mean w + 2.5 std w | LoftQ's code |
| int8 | -127 … 127, divided by 127 | max abs w of the row | Dettmers et al. 2022, bitsandbytes |

On gaussian weights the relative error ``‖W - Q‖ / ‖W‖`` is about 0.092 for nf4/64.

Deviations:
    - uniform: LoftQ's two programs differ. This is the one for language models (blocks, a table);
      the GLUE one clips the whole matrix at mean ± 2 std. In blocks whose mean is below -1.5 std,
      where its scale vanishes or turns negative, we take abs(mean) + 2.5 std.
    - nf4: codes and scales are those of bitsandbytes. So are the values, except that version 0.50
      on a CPU with AVX-512 restarts the blocks at each row when it dequantises: where the row
      length is even and no multiple of the block, its values belong to other blocks' scales.
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

# Keeps 127 / scale finite, so that a block of zeros becomes zeros and not NaN.
SMALLEST_SCALE = 1e-36
BITS = {"nf4": (4,), "nf2": (2,), "uniform": (2, 4, 8), "int8": (8,)}

# bitsandbytes' constants. They are the quantiles of `normal_float_table(4)` rounded elsewhere, so
# computing them would move a few codes.
NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Quantized:
    """A quantised weight.

    Attributes:
        codes: (out, in), one code per element: uint8 indices into the table; for "int8" the int8
            values themselves, as bitsandbytes stores them.
        scale: float32, one per block, or one per row for "int8".
        quantizer: the map that made it.
    """

    codes: Tensor
    scale: Float[Tensor, " blocks"]
    quantizer: Quantizer


@dataclass(frozen=True)
class Quantizer:
    """A deterministic map from a weight to its quantised values.

    Attributes:
        kind: "nf4", "nf2", "uniform" or "int8".
        bits: 4 for nf4, 2 for nf2, 2, 4 or 8 for uniform, 8 for int8.
        block_size: elements that share a scale; "int8", which scales rows, does not read it.

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

    @property
    def name(self) -> str:
        """A short label: "nf4/64", "nf2/64", "uniform2/64", "int8"."""
        if self.kind == "int8":
            return "int8"
        bits = str(self.bits) if self.kind == "uniform" else ""
        return f"{self.kind}{bits}/{self.block_size}"

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

    @torch.no_grad()
    def quantize(self, weight: Float[Tensor, "out in"]) -> Quantized:
        """Return the nearest codes; on a tie the lower one (int8: the even one).

        Args:
            weight: (out, in), any float dtype; computed in float32.

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
            steps = weight * (127.0 / scale.clamp(min=SMALLEST_SCALE))[:, None]
            codes = torch.round(steps).to(torch.int8)
            return Quantized(codes, scale, self)
        table = _table(self.kind, self.bits).to(weight.device)
        # A value lies nearest to the entry whose pair of midpoints encloses it: one sorted look-up,
        # and no (numel, table) array of distances.
        midpoints = (table[1:] + table[:-1]) / 2
        codes, scales = [], []
        for blocks in _blocks(weight.reshape(-1), self.block_size):
            scale = _deviation_scale(blocks) if self.kind == "uniform" else blocks.abs().amax(dim=1)
            # Multiplied by the reciprocal, as bitsandbytes does: a division rounds differently.
            normalised = blocks * (1.0 / scale.clamp(min=SMALLEST_SCALE))[:, None]
            found = torch.bucketize(normalised, midpoints, out_int32=True).to(torch.uint8)
            codes.append(found.reshape(-1))
            scales.append(scale)
        return Quantized(torch.cat(codes).reshape(weight.shape), torch.cat(scales), self)

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
        table = _table(self.kind, self.bits).to(codes.device)
        values = table.index_select(0, codes.reshape(-1).int())
        first = 0
        for blocks in _blocks(values, self.block_size):
            blocks.mul_(scale[first : first + len(blocks), None])
            first += len(blocks)
        return values.reshape(codes.shape)

    def roundtrip(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """``dequantize(quantize(weight))``: the values a model with this weight computes with."""
        return self.dequantize(self.quantize(weight))


def normal_float_table(
    bits: int, *, symmetric: bool = False, offset: float = 0.9677083
) -> Float[Tensor, " codes"]:
    """Return the NormalFloat values: quantiles of N(0, 1) at even probabilities, scaled to max 1.

    Asymmetric (the default of QLoRA and LoftQ): 2^(bits-1) positive values, 0, and
    2^(bits-1) - 1 negative ones, so that 0 is exact. Symmetric: the means of neighbouring
    quantiles, none of them 0.

    Args:
        bits: 2^bits values.
        offset: the outermost probability; 1 would put the last value at infinity.
    """
    half = 2 ** (bits - 1)

    def quantiles(first: float, last: float, count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(first, last, count, dtype=torch.float64))

    if symmetric:
        edges = quantiles(1 - offset, offset, 2 * half + 1)
        values = (edges[1:] + edges[:-1]) / 2
    else:
        # Both series start at the offset and end before the median, which is the 0 between them.
        positive = quantiles(offset, 0.5, half + 1)[:-1]
        negative = -quantiles(offset, 0.5, half)[:-1]
        values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive])
    values = values.sort().values
    return (values / values.max()).float()


@cache
def _table(kind: str, bits: int) -> Tensor:
    if kind == "nf4":
        return torch.tensor(NF4_TABLE)
    if kind == "nf2":
        return normal_float_table(2)
    return torch.linspace(-1, 1, 2**bits)


def _blocks(flat: Tensor, size: int) -> Iterator[Tensor]:
    """Views of `flat`: the full blocks as (blocks, size), then what is left as one short block."""
    full = flat.numel() - flat.numel() % size
    if full:
        yield flat[:full].view(-1, size)
    if full < flat.numel():
        yield flat[full:].view(1, -1)


def _deviation_scale(blocks: Float[Tensor, "blocks size"]) -> Float[Tensor, " blocks"]:
    """LoftQ's clipping point ``mean + 2.5 std`` (unbiased), see the module's deviations."""
    mean = blocks.mean(dim=1)
    deviation = blocks.std(dim=1) if blocks.shape[1] > 1 else torch.zeros_like(mean)
    return torch.where(mean < -1.5 * deviation, mean.abs(), mean) + 2.5 * deviation
