"""The result of a partial decomposition: its triplets, their signs, and how good they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import dense
from lora_init.linalg.draws import Generators
from lora_init.linalg.operators import Operator
from lora_init.linalg.thin import thin_qr

LEAST_TRIPLETS = 12
"""The least columns whose products MKL rounds alike for every layout of a float32 matrix."""


@dataclass(frozen=True)
class Decomposition:
    """The triplets ``matrix @ right = left * values`` and ``matrix.T @ left = right * values``.

    Attributes:
        left: (*stack, m, k), orthonormal columns.
        values: (*stack, k), descending from `top_singular`, ascending from `bottom_singular`.
        right: (*stack, n, k), orthonormal columns: right singular vectors are columns, not rows.
        method: the method that computed it (see `top_singular` and `bottom_singular`).
        residual: (*stack), float64: the largest ``‖W v_i - s_i u_i‖`` or ``‖W^T u_i - s_i v_i‖``,
            divided by s_1; 0 for a zero matrix. For "powers", before the last half step.
        largest: (*stack), float64: s_1 of the whole matrix; from `bottom_singular`, within a factor
            of two.
    """

    left: Float[Tensor, "*stack m k"]
    values: Float[Tensor, "*stack k"]
    right: Float[Tensor, "*stack n k"]
    method: str
    residual: Float[Tensor, "*stack"]
    largest: Float[Tensor, "*stack"]

    def leading(self, rank: int) -> Decomposition:
        """Return the first `rank` triplets."""
        left, values, right = (t[..., :rank] for t in (self.left, self.values, self.right))
        return replace(self, left=left, values=values, right=right)

    def to(self, dtype: torch.dtype) -> Decomposition:
        """Return the triplets in `dtype`."""
        left, values, right = (t.to(dtype) for t in (self.left, self.values, self.right))
        return replace(self, left=left, values=values, right=right)


def nesting_rank(rank: int, limit: int, *, smallest: int = 16) -> int:
    """Return the rank to decompose for `rank`: the next power of two, `smallest` to `limit`.

    The last digits of a partial decomposition depend on the number of triplets. Neighboring ranks
    therefore share one decomposition, and each takes its first `rank` triplets.
    """
    return min(limit, max(smallest, 1 << (rank - 1).bit_length()))


def from_right(
    operator: Operator,
    right: Float[Tensor, "*stack n k"],
    method: str,
    *,
    rank: int | None = None,
    largest: Float[Tensor, "*stack"] | None = None,
) -> Decomposition:
    """Return the best triplets whose right vectors lie in the span of `right`, values descending.

    This is one-sided Rayleigh-Ritz: with ``W right = Q T`` and ``T = P S Z^T``, the triplets are
    Q P, S and right Z, and their product is W projected on the span exactly.

    Args:
        right: orthonormal columns.
        rank: how many triplets to keep; None: all.
        largest: s_1, the scale of the residual, if it is not among the triplets.
    """
    left, values, right = rotated(right, operator.matmul(right.to(operator.dtype)), rank)
    # W right = left S holds by construction. The other half shows how good the span is.
    backward = operator.rmatmul(left).double() - right.double() * values.double()[..., None, :]
    error = torch.linalg.vector_norm(backward, dim=-2).amax(-1)
    scale = values[..., 0].double() if largest is None else largest.double()
    left, values, right = (t.contiguous() for t in (left, values, right))
    return Decomposition(left, values, right, method, relative(error, scale), scale)


def rotated(
    right: Float[Tensor, "*stack n k"],
    image: Float[Tensor, "*stack m k"],
    rank: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return left, values and right, in the dtype of ``image = W right``: best in that span.

    Householder's QR completes a rank-deficient image to an orthonormal basis, without NaN.
    """
    basis, triangle = thin_qr(image)
    inner, values, rotation = dense.svd(triangle.double())
    left = (basis.double() @ inner[..., :rank]).to(image.dtype)
    right = (right.double() @ rotation.mT[..., :rank]).to(image.dtype)
    left, right = fix_signs(left, right)
    return left, values[..., :rank].to(image.dtype), right


def fix_signs(
    left: Float[Tensor, "*stack m k"], right: Float[Tensor, "*stack n k"]
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack n k"]]:
    """Flip pairs of columns so that each left vector's entry of largest magnitude is positive.

    On ties the first such entry counts. ``left @ diag @ right.T`` stays the same.
    """
    largest = left.gather(-2, left.abs().argmax(dim=-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return left * signs, right * signs


def relative(error: Tensor, scale: Tensor) -> Tensor:
    """Return error / scale, and 0 where the scale is 0."""
    return torch.where(scale > 0, error / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


def swapped(found: Decomposition) -> Decomposition:
    """Return the triplets of the transposed matrix."""
    left, right = fix_signs(found.right, found.left)
    return replace(found, left=left, right=right)


def flipped(found: Decomposition) -> Decomposition:
    """Return the triplets in the opposite order."""
    left, values, right = (t.flip(-1) for t in (found.left, found.values, found.right))
    return replace(found, left=left, values=values, right=right)


@overload
def members_of(
    stack: Tensor, generator: Generators | None, start: Tensor | None = None
) -> Iterator[tuple[Tensor, torch.Generator | None, Tensor | None]]: ...


@overload
def members_of(
    stack: Sequence[Operator], generator: Generators | None, start: Tensor | None = None
) -> Iterator[tuple[Operator, torch.Generator | None, Tensor | None]]: ...


def members_of(
    stack: Tensor | Sequence[Operator], generator: Generators | None, start: Tensor | None = None
) -> Iterator[tuple[Tensor | Operator, torch.Generator | None, Tensor | None]]:
    """Yield each matrix or map of a stack with its own generator and start."""
    members = stack.reshape(-1, *stack.shape[-2:]) if isinstance(stack, Tensor) else stack
    generators, starts = generator, [None] * len(members)
    if generators is None or isinstance(generators, torch.Generator):
        generators = [generators] * len(members)
    if start is not None:
        starts = start.reshape(-1, *start.shape[-2:])
    yield from zip(members, generators, starts, strict=True)


def joined(found: Sequence[Decomposition], stack: Sequence[int]) -> Decomposition:
    """Return the decompositions of a stack's members as one.

    Its `method` is the first one that differs from the first member's, if any does.
    """
    methods = [one.method for one in found]
    method = next((name for name in methods if name != methods[0]), methods[0])

    def part(name: str) -> Tensor:
        parts = torch.stack([getattr(one, name) for one in found])
        return parts.reshape(*stack, *parts.shape[1:])

    names = ("left", "values", "right", "residual", "largest")
    return Decomposition(method=method, **{name: part(name) for name in names})
