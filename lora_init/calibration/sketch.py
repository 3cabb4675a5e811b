"""The leading part of a covariance C from n × l sums, for inputs whose n × n sums do not fit.

With a fixed Ω (in, l) of orthonormal columns, drawn once from a gaussian, one pass sums Y = C Ω and
the trace of C. Both are linear in the rows, so that the order of the batches and the number of
ranks do not matter. Then

    C̃ = Y (Ωᵀ Y)⁺ Yᵀ

is Nyström's approximation: C½ P C½, P the projection on the range of C½ Ω. So C - C̃ has no negative
eigenvalue, and its nuclear norm, which bounds every other of its norms, is known exactly:

    ‖C - C̃‖ <= ‖C - C̃‖_* = tr C - tr C̃.

That share of the trace is the `error` that is stated, with an allowance for float32's rounding. It
bounds what each variance is short of: 0 <= λ_i(C) - λ_i(C̃) <= error · tr C. Leading directions are
far better than the bound where the spectrum decays; expect ‖C - C̃‖_* <= (1 + k / (l - k - 1)) times
that of the best approximation of rank k, for every k < l - 1.

Share of the variance that the leading 16 of 1536 directions of C̃ capture, of what C's own capture
(6,000 gaussian rows, l = 64, 128, 256, 512): variances i^-1: 0.976, 0.990, 0.998, 1.000; i^-1.5:
0.998, 1.000, 1.000, 1.000.

Source: Gittens & Mahoney, "Revisiting the Nyström Method for Improved Large-Scale Machine
Learning", JMLR 17 (2016); Tropp, Yurtsever, Udell & Cevher, "Fixed-Rank Approximation of a
Positive-Semidefinite Matrix from Streaming Data", NeurIPS 2017, arXiv 1706.05736 (for the
expectation). Their small shift of C is left out: eigenvalues of Ωᵀ Y that are rounding (CUTOFF)
are, with their directions of Ω, which keeps P a projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import linalg
from lora_init.calibration.sums import Moments, RunningSums
from lora_init.linalg.draws import normal
from lora_init.linalg.row_blocks import Block
from lora_init.moments import Components, LeadingComponents, leading

SEED = 0
"""Ω is the same in every process, pass and run."""

CUTOFF = 1e-6
"""Of the largest eigenvalue of Ωᵀ Y, which comes from float32 products."""

ROUNDING = 1e-5
"""Of the trace: what float32 products may add to the error."""


@dataclass
class SketchedStatistics:
    """As `lora_init.moments.InputStatistics`, from C̃ in the place of C.

    Attributes:
        factor: F with C̃ = F Fᵀ.
        mean: sum x / tokens, float64.
        tokens: how many rows were counted.
        variance: tr C.
        error: bound on ‖C - C̃‖ / tr C, in the spectral, Frobenius and nuclear norm.
    """

    factor: Float[Tensor, "in columns"]
    mean: Float[Tensor, " in"]
    tokens: int
    variance: float
    error: float

    @classmethod
    def of(cls, moments: Moments) -> SketchedStatistics:
        """C̃ from Y, Ω and the trace."""
        products = moments.products.double()
        inner = moments.basis.double().T @ products
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        kept = values > CUTOFF * values[-1]
        factor = products @ vectors[:, kept] / values[kept].sqrt()
        variance = float(moments.variance)
        left_out = max(variance - float(factor.square().sum()), 0.0)
        error = left_out / variance + ROUNDING if variance > 0 else 0.0
        return cls(factor.float(), moments.mean, moments.tokens, variance, error)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def covariance(self) -> Float[Tensor, "in in"]:
        """C̃, float32: n² numbers, made anew at every use."""
        return self.factor @ self.factor.T

    @property
    def second_moment(self) -> Float[Tensor, "in in"]:
        """C̃ + mean meanᵀ in float64, made anew at every use."""
        factor = self.factor.double()
        return (factor @ factor.T).addr_(self.mean, self.mean)

    def principal_components(self, rank: int, center: bool) -> Components:
        """As of `InputStatistics`; the total variance is the exact one.

        Raises:
            ValueError: the sketch has fewer than `rank` columns.
        """
        components = self._centred if center else self._uncentred
        if rank > len(components[0]):
            raise ValueError(
                f"calibration_sketch: {rank} directions are asked for, and the inputs' sketch has "
                f"{len(components[0])}; pass a larger calibration_sketch"
            )
        return leading(components, rank)

    def condensed(self, rank: int) -> LeadingComponents:
        return LeadingComponents(
            {center: self.principal_components(rank, center) for center in (True, False)},
            self.error,
        )

    def to(self, device: torch.device) -> SketchedStatistics:
        return SketchedStatistics(
            self.factor.to(device), self.mean.to(device), self.tokens, self.variance, self.error
        )

    @cached_property
    def _centred(self) -> Components:
        return _components(self.factor.double(), self.variance)

    @cached_property
    def _uncentred(self) -> Components:
        factor = torch.cat([self.factor.double(), self.mean[:, None]], dim=1)
        return _components(factor, self.variance + float(self.mean.square().sum()))


def _components(factor: Float[Tensor, "in columns"], total: float) -> Components:
    # Through a QR: its vectors are orthonormal where singular values are zero, too.
    basis, triangle = torch.linalg.qr(factor)
    rotation, values, _ = torch.linalg.svd(triangle)
    vectors = basis @ rotation
    vectors, _ = linalg.fix_signs(vectors, vectors)
    return values.square().float(), vectors.float(), vectors.new_tensor(total).float()


class RunningSketch(RunningSums):
    """Products of the rows added so far with those of Ω, in float64 over blocks of float32.

    Args:
        basis: Ω, on the device where the sums live.
    """

    def __init__(self, basis: Float[Tensor, "in columns"]) -> None:
        super().__init__(len(basis), basis.device)
        self._basis = basis
        self._products = torch.zeros_like(basis, dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64, device=basis.device)

    @staticmethod
    def bytes(width: int, columns: int) -> int:
        """Memory while rows are added, Ω included, which inputs of one width share."""
        return (8 + 4) * width * columns + RunningSums.block_bytes(width)

    def _accumulate(self, block: Block) -> None:
        rows = block.rows
        self._products += rows.T @ (rows @ self._basis)
        self._squares += rows.square().sum()

    def _centred(self, mean: Float[Tensor, " in"], offset: Float[Tensor, " in"]) -> Moments:
        tokens = max(self.tokens, 1)
        products = self._products / tokens
        products.addr_(offset, offset @ self._basis.double(), alpha=-1)
        variance = self._squares / tokens - offset.square().sum()
        return Moments(self.tokens, mean, products, variance, self._basis)


def random_basis(width: int, columns: int, device: torch.device) -> Float[Tensor, "in columns"]:
    """Ω: orthonormal columns whose span is uniformly distributed, drawn on the CPU."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.linalg.qr(normal(width, columns, generator=generator))[0].to(device)
