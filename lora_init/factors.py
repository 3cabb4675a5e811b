"""The output of an initializer: the two factors and what happens to the base weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import matrix
from lora_init.linalg.matrix import widened
from lora_init.linalg.precision import full_precision, wide, wide_device, without_autocast

if TYPE_CHECKING:
    from lora_init.quantization import Quantizer

Base = Literal["keep", "subtract", "replace"]
"""What a method does to the base weight W, with scaling s and initial factors B0, A0.

- ``keep``: the layer computes ``W x + s B A x``.
- ``subtract``: it computes ``(W - s B0 A0) x + s B A x``, which equals W x at step 0.
- ``replace``: it computes ``Q x + s B A x``, where Q is a quantized weight.
"""


@dataclass(frozen=True)
class Replacement:
    """The recipe to compute a quantized base from the original weight.

    ``Q = dequantize(quantize(W - s lora_B lora_A))``, with the factors of the method's last
    quantization step, which may differ from the returned factors. The quantizer is deterministic,
    so r(m + n) stored numbers are enough to rebuild the m n codes.

    Attributes:
        quantizer: the quantizer of the base.
        lora_A: A in the formula, (rank, in).
        lora_B: B in the formula, (out, rank).
        checksum: checksum of Q in the loaded file, if any (see `lora_init.injection.checksum`).
    """

    quantizer: Quantizer
    lora_A: Float[Tensor, "*stack rank in"]
    lora_B: Float[Tensor, "*stack out rank"]
    checksum: str | None = None

    def members(self) -> list[Replacement]:
        """The recipe of each layer of a stack."""
        pairs = zip(self.lora_A, self.lora_B, strict=True)
        return [replace(self, lora_A=lora_A, lora_B=lora_B) for lora_A, lora_B in pairs]

    def residual(
        self, weight: Float[Tensor, "*stack out in"], scaling: float
    ) -> Float[Tensor, "*stack out in"]:
        """W - s B A in float32: the matrix that is quantized.

        The product is computed in float64 and rounded once. Another thread count or device may sum
        in another order. A change in the last float32 bit could cross a threshold of the quantizer.
        """
        if weight.ndim > 2:
            pairs = zip(self.members(), weight, strict=True)
            return torch.stack([one.residual(matrix, scaling) for one, matrix in pairs])
        home, place = weight.device, wide_device(weight.device)
        lora_A, lora_B, weight = wide(self.lora_A), wide(self.lora_B), weight.to(place)
        residual = matrix.empty(weight.shape, torch.float32, weight.device)
        rows = matrix.rows_together(weight.shape[1])
        together = rows if weight.device.type == "cpu" else len(weight)
        parts = (t.split(together) for t in (weight, lora_B, residual))
        for some, of_some, into in zip(*parts, strict=True):
            product = (of_some @ lora_A).mul_(scaling)
            into.copy_(torch.sub(some, product, out=product))
        return residual.to(home)

    def base(
        self, weight: Float[Tensor, "*stack out in"], scaling: float
    ) -> Float[Tensor, "*stack out in"]:
        """Q in float32, computed from the original weight."""
        if weight.ndim > 2:
            pairs = zip(self.members(), weight, strict=True)
            return torch.stack([one.base(matrix, scaling) for one, matrix in pairs])
        return self.quantizer.roundtrip(self.residual(weight, scaling))


@dataclass(frozen=True)
class Factors:
    """The result of one initializer for one layer.

    Attributes:
        lora_A: A0, shape (rank, in), float32.
        lora_B: B0, shape (out, rank), float32.
        base: what the method does to the base; `init_factors` sets it.
        core: R0, shape (rank, rank), float32, for methods that train only a matrix between frozen
            factors: the layer adds s B R A x. None for all other methods.
        replacement: the recipe of the base; only for ``replace`` methods.
        metrics: figures of the method for reports (`error`, `captured_energy`, …). A count may be
            a vector with one entry per component, if the factors of rank r are the first r of a
            higher rank. The report shows its sum over the components in use.
    """

    lora_A: Float[Tensor, "*stack rank in"]
    lora_B: Float[Tensor, "*stack out rank"]
    replacement: Replacement | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    core: Float[Tensor, "*stack rank rank"] | None = None
    base: Base | None = None

    @property
    def output_factor(self) -> Float[Tensor, "*stack out rank"]:
        """B, or B R with a core: the adapter's product is s times this times A."""
        return output_factor(self.lora_B, self.core)


def output_factor(
    lora_B: Float[Tensor, "*stack out rank"], core: Float[Tensor, "*stack rank rank"] | None
) -> Float[Tensor, "*stack out rank"]:
    """B, or B R in float32 or wider with a core; differentiable."""
    if core is None:
        return lora_B
    with without_autocast():  # 16-bit products would round the factor
        return widened(lora_B) @ widened(core)


def low_rank_product(
    lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Float[Tensor, "*stack out in"]:
    """s B A in float32 or float64."""
    with full_precision():
        if lora_A.ndim > 2:
            return (widened(lora_B.detach()) * scaling) @ widened(lora_A.detach())
        return matrix.product(widened(lora_B.detach()) * scaling, widened(lora_A.detach()))


def fused(experts: Sequence[Factors]) -> Factors:
    """The factors of all experts' matrices along a new first dimension, with `mean_figures`."""
    first = experts[0]
    replacement = None
    if first.replacement is not None:
        recipes = [one.replacement for one in experts if one.replacement is not None]
        replacement = replace(
            first.replacement,
            lora_A=torch.stack([recipe.lora_A for recipe in recipes]),
            lora_B=torch.stack([recipe.lora_B for recipe in recipes]),
        )
    cores = [one.core for one in experts if one.core is not None]
    return Factors(
        torch.stack([one.lora_A for one in experts]),
        torch.stack([one.lora_B for one in experts]),
        replacement,
        metrics=mean_figures([one.metrics for one in experts]),
        core=torch.stack(cores) if cores else None,
    )


def mean_figures(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over experts of each number; a figure that is not a number if all have the same."""
    means: dict[str, Any] = {}
    for name in figures[0]:
        values: list[Any] = [one.get(name) for one in figures]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            means[name] = sum(values) / len(values)
        elif all(value == values[0] for value in values):
            means[name] = values[0]
    return means


def block_matrix(
    blocks: Float[Tensor, "*experts rows columns_of_group"], groups: int
) -> Float[Tensor, "*experts rows columns"]:
    """The block-diagonal matrix of stacked blocks of equal shape; differentiable.

    With B (out, rank) of this form, B A is the product of each group of a grouped convolution. The
    rows of a group read its rank / groups rows of A and no others.
    """
    if groups == 1:
        return blocks
    each = blocks.unflatten(0, (groups, -1)).movedim(0, -1)
    return torch.diag_embed(each).permute(2, 0, 3, 1).flatten(2).flatten(0, 1)


def matrix_blocks(
    block_diagonal: Float[Tensor, "rows columns"], groups: int
) -> Float[Tensor, "rows columns_of_group"]:
    """The inverse of `block_matrix`."""
    if groups == 1:
        return block_diagonal
    each = block_diagonal.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    return each.diagonal(dim1=0, dim2=2).movedim(-1, 0).flatten(0, 1)


def unstacked(stack: Factors, count: int) -> list[Factors]:
    """Split a stack's factors, and its metrics that are tensors, into those of each layer."""
    replacements = [None] * count if stack.replacement is None else stack.replacement.members()
    return [
        Factors(
            stack.lora_A[index],
            stack.lora_B[index],
            replacements[index],
            metrics={
                name: value[index] if isinstance(value, Tensor) else value
                for name, value in stack.metrics.items()
            },
            core=None if stack.core is None else stack.core[index],
        )
        for index in range(count)
    ]
