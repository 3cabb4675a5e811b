"""Synthetic weights whose singular triplets are known: power-law spectra, no decomposition.

    W = U diag(s) Vᵀ,    U = D1 C D2 C,    V = D4 C D3 C    (their first min(m, n) columns),

C the orthonormal cosine transform (DCT-II) of its side's length and D diagonals of random signs:
orthogonal, as dense as random bases are, and multiplied by in O(mn log(mn)). s_i = s_1 i^-0.7, with
s_1 such that the entries have the standard deviation 0.02 that transformers draw with. Float32
rounds a vector of U or V by 1e-6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy.fft
import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.layer import layer_generator

EXPONENT = 0.7
DEVIATION = 0.02


@dataclass(frozen=True)
class PowerLaw:
    """The weight (rows, columns) that belongs to `name` under `seed`."""

    rows: int
    columns: int
    name: str
    seed: int = 0

    @property
    def values(self) -> Float[Tensor, " k"]:
        """The singular values, float64, descending."""
        shape = torch.arange(1, self._count + 1, dtype=torch.float64) ** -EXPONENT
        return shape * (DEVIATION * math.sqrt(self.rows * self.columns) / float(shape.norm()))

    @torch.no_grad()
    def weight(self, device: torch.device | str = "cpu") -> Float[Tensor, "rows columns"]:
        """W in float32, built where it will be."""
        made = torch.zeros(self.rows, self.columns, device=device)
        made.diagonal().copy_(self.values)
        row_signs, column_signs = self._signs(device)
        return mixed(mixed(made, row_signs).T, column_signs).T.contiguous()

    def left(self, first: int, last: int, device: torch.device | str = "cpu") -> Tensor:
        """Left singular vectors first … last-1 as columns (rows, last - first), float32."""
        return self._basis(self.rows, self._signs(device)[0], first, last)

    def right(self, first: int, last: int, device: torch.device | str = "cpu") -> Tensor:
        """Right singular vectors likewise, (columns, last - first)."""
        return self._basis(self.columns, self._signs(device)[1], first, last)

    @property
    def _count(self) -> int:
        return min(self.rows, self.columns)

    def _basis(self, size: int, signs: Tensor, first: int, last: int) -> Tensor:
        unit = torch.zeros(size, last - first, device=signs.device)
        unit[torch.arange(first, last), torch.arange(last - first)] = 1.0
        return mixed(unit, signs)

    def _signs(self, device: torch.device | str) -> list[Float[Tensor, "2 side"]]:
        generator = layer_generator(self.seed, f"power law {self.name}")
        return [
            torch.randint(0, 2, (2, side), generator=generator).mul(2).sub(1).float().to(device)
            for side in (self.rows, self.columns)
        ]


def mixed(block: Float[Tensor, "n k"], signs: Float[Tensor, "2 n"]) -> Float[Tensor, "n k"]:
    """D1 C D2 C block."""
    inner = cosine_transform(block) * signs[1][:, None]
    return cosine_transform(inner) * signs[0][:, None]


def cosine_transform(block: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """The orthonormal DCT-II of each column: scipy's on a CPU, by torch's FFT elsewhere."""
    if block.device.type == "cpu":
        made = scipy.fft.dct(block.numpy(), axis=0, norm="ortho", workers=torch.get_num_threads())
        return torch.from_numpy(made)
    return by_fft(block)


def by_fft(block: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """The same from one complex FFT of the even entries followed by the odd ones backwards."""
    n = len(block)
    spectrum = torch.fft.fft(torch.cat([block[::2], block[1::2].flip(0)]), dim=0)
    angles = torch.arange(n, dtype=torch.float64, device=block.device) * (-math.pi / (2 * n))
    turn = torch.polar(torch.ones_like(angles), angles).to(spectrum.dtype)
    made = (spectrum * turn[:, None]).real * math.sqrt(2 / n)
    made[0] /= math.sqrt(2)
    return made
