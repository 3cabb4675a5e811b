"""What a partial decomposition returns: its triplets, their signs, and how good they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import dense as small
from lora_init.linalg.operators import Operator
from lora_init.linalg.thin import thin_qr


@dataclass(frozen=True)
class Decomposition:
    """The triplets ``matrix @ right = left * values`` and ``matrix.T @ left = right * values``.

    Attributes:
        left: (*stack, m, k), orthonormal columns.
        values: (*stack, k), descending from `top_singular`, ascending from `bottom_singular`.
        right: (*stack, n, k), orthonormal columns: right singular vectors are columns, not rows.
        method: what computed it (see `top_singular` and `bottom_singular`).
        residual: (*stack), float64: the largest ``‖W v_i - s_i u_i‖`` or ``‖W^T u_i - s_i v_i‖``,
            divided by s_1; 0 for a zero matrix. Of "powers", before a last half step improves it.
        largest: (*stack), float64: s_1 of the whole matrix; from `bottom_singular`, to within a
            factor of two.
    """

    left: Float[Tensor, "*stack m k"]
    values: Float[Tensor, "*stack k"]
    right: Float[Tensor, "*stack n k"]
    method: str
    residual: Float[Tensor, "*stack"]
    largest: Float[Tensor, "*stack"]

    def leading(self, rank: int) -> Decomposition:
        """The first `rank` triplets."""
        return replace(
            self,
            left=self.left[..., :rank],
            values=self.values[..., :rank],
            right=self.right[..., :rank],
        )

    def to(self, dtype: torch.dtype) -> Decomposition:
        return replace(
            self, left=self.left.to(dtype), values=self.values.to(dtype), right=self.right.to(dtype)
        )


def from_right(
    operator: Operator,
    right: Float[Tensor, "*stack n k"],
    method: str,
    *,
    rank: int | None = None,
    largest: Float[Tensor, "*stack"] | None = None,
) -> Decomposition:
    """The best triplets whose right vectors lie in the span of `right`, values descending.

    One-sided Rayleigh-Ritz: with ``W right = Q T`` and ``T = P S Z^T``, left = Q P and right Z;
    ``left S right^T`` is then W projected on the span exactly. Householder's QR completes a
    rank-deficient block to an orthonormal one: null directions yield vectors and no NaN.

    Args:
        right: orthonormal columns.
        rank: how many triplets are kept; None: all.
        largest: s_1, the scale of the residual, where it is not among the triplets.
    """
    left, values, right = rotated(right, operator.matmul(right.to(operator.dtype)), rank)
    # W right = left S holds by construction; the other half says how good the span is.
    backward = operator.rmatmul(left).double() - right.double() * values.double()[..., None, :]
    error = torch.linalg.vector_norm(backward, dim=-2).amax(-1)
    scale = values[..., 0].double() if largest is None else largest.double()
    return Decomposition(
        left.contiguous(),
        values.contiguous(),
        right.contiguous(),
        method,
        relative(error, scale),
        scale,
    )


def one_by_one(
    decompose: Callable[..., Decomposition],
    stack: Float[Tensor, "*stack m n"] | Sequence[Operator],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    start: Float[Tensor, "*stack n k"] | None = None,
) -> Decomposition:
    """Decompose every matrix of a stack by itself.

    Where one member needs a more careful method, the others keep theirs. The result's `method` is
    the first one that differs from the first member's, if any does.

    Args:
        decompose: takes a matrix, and its generator and start by name.
        stack: of matrices; or maps.
    """
    leading, members = (len(stack),), stack
    if isinstance(stack, Tensor):
        leading = stack.shape[:-2]
        members = stack.reshape(-1, *stack.shape[-2:])
    single = generator is None or isinstance(generator, torch.Generator)
    generators = [generator] * len(members) if single else generator
    starts = [None] * len(members)
    if start is not None:
        starts = start.reshape(-1, *start.shape[-2:])
    found = [
        decompose(matrix, generator=draws, start=first)
        for matrix, draws, first in zip(members, generators, starts, strict=True)
    ]
    methods = [one.method for one in found]
    method = next((name for name in methods if name != methods[0]), methods[0])

    def joined(name: str) -> Tensor:
        part = torch.stack([getattr(one, name) for one in found])
        return part.reshape(*leading, *part.shape[1:])

    names = ("left", "values", "right", "residual", "largest")
    return Decomposition(method=method, **{name: joined(name) for name in names})


def rotated(
    right: Float[Tensor, "*stack n k"],
    image: Float[Tensor, "*stack m k"],
    rank: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(left, values, right) in the dtype of ``image = W right``: best in the span of `right`."""
    basis, triangle = thin_qr(image)
    inner, values, rotation = small.svd(triangle.double())
    left = (basis.double() @ inner[..., :rank]).to(image.dtype)
    right = (right.double() @ rotation.mT[..., :rank]).to(image.dtype)
    left, right = fix_signs(left, right)
    return left, values[..., :rank].to(image.dtype), right


def relative(error: Tensor, scale: Tensor) -> Tensor:
    """error / scale, 0 where the scale is."""
    return torch.where(scale > 0, error / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


def swapped(found: Decomposition) -> Decomposition:
    """The triplets of the transposed matrix."""
    left, right = fix_signs(found.right, found.left)
    return replace(found, left=left, right=right)


def flipped(found: Decomposition) -> Decomposition:
    """The triplets in the opposite order."""
    return replace(
        found,
        left=found.left.flip(-1),
        values=found.values.flip(-1),
        right=found.right.flip(-1),
    )


def fix_signs(
    left: Float[Tensor, "*stack m k"], right: Float[Tensor, "*stack n k"]
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack n k"]]:
    """Flip pairs of columns so that each left vector's entry of largest magnitude is positive.

    On ties the first such entry counts. ``left @ diag @ right.T`` stays the same.
    """
    largest = left.gather(-2, left.abs().argmax(dim=-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return left * signs, right * signs
