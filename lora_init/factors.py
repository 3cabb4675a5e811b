"""What an initializer returns: the two factors, and what becomes of the base weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import matrix
from lora_init.linalg.precision import full_precision

if TYPE_CHECKING:
    from lora_init.quantization import Quantizer

Base = Literal["keep", "subtract", "replace"]
"""What a method does to the base weight W, given the scaling s and its factors B0, A0:

- ``keep``: the layer computes ``W x + s B A x``;
- ``subtract``: ``(W - s B0 A0) x + s B A x``, the original function at step 0;
- ``replace``: ``Q x + s B A x``, where Q is a quantised weight.
"""


@dataclass(frozen=True)
class Replacement:
    """A quantised base that can be computed again from the original weight.

    ``Q = dequantize(quantize(W - s lora_B lora_A))``. The factors are those of the method's last
    quantisation step, not the ones it returns: storing r(m + n) numbers instead of m n codes is
    enough to rebuild Q, because the quantiser is a deterministic map. `checksum` is that of Q in
    the file that these come from, if any (see `lora_init.weights.checksum`).
    """

    quantizer: Quantizer
    lora_A: Float[Tensor, "*stack rank in"]
    lora_B: Float[Tensor, "*stack out rank"]
    checksum: str | None = None

    def members(self) -> list[Replacement]:
        """Of a stack: each layer's."""
        pairs = zip(self.lora_A, self.lora_B, strict=True)
        return [replace(self, lora_A=lora_A, lora_B=lora_B) for lora_A, lora_B in pairs]

    def residual(
        self, weight: Float[Tensor, "*stack out in"], scaling: float
    ) -> Float[Tensor, "*stack out in"]:
        """W - s B A, what is quantised, in float32.

        The product is taken in float64 and rounded once: another thread count or device may sum
        it in another order, and a float32 sum that moved in its last bit could cross one of the
        quantiser's thresholds.
        """
        if weight.ndim > 2:
            pairs = zip(self.members(), weight, strict=True)
            return torch.stack([one.residual(matrix, scaling) for one, matrix in pairs])
        lora_A, lora_B = self.lora_A.double(), self.lora_B.double()
        residual = matrix.empty(weight.shape, torch.float32, weight.device)
        rows = matrix.rows_together(weight.shape[1])
        together = rows if weight.device.type == "cpu" else len(weight)
        parts = (t.split(together) for t in (weight, lora_B, residual))
        for some, of_some, into in zip(*parts, strict=True):
            product = (of_some @ lora_A).mul_(scaling)
            into.copy_(torch.sub(some, product, out=product))
        return residual

    def base(
        self, weight: Float[Tensor, "*stack out in"], scaling: float
    ) -> Float[Tensor, "*stack out in"]:
        """Q in float32, from the original weight."""
        return self.quantizer.roundtrip(self.residual(weight, scaling))


@dataclass(frozen=True)
class Factors:
    """The result of one initializer for one layer.

    Attributes:
        lora_A: A0, shape (rank, in), float32.
        lora_B: B0, shape (out, rank), float32.
        replacement: how to rebuild the base; for ``replace`` methods only.
        metrics: figures the method knows about itself (`error`, `captured_energy`, …) for reports.
            A method whose factors nest gives a count as a vector with one entry for each component:
            the report has the sum over the components that are used.
    """

    lora_A: Float[Tensor, "*stack rank in"]
    lora_B: Float[Tensor, "*stack out rank"]
    replacement: Replacement | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)


def low_rank_product(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Float[Tensor, "out in"]:
    """s B A in float32 or wider."""
    with full_precision():
        return matrix.product(widened(lora_B.detach()) * scaling, widened(lora_A.detach()))


def unstacked(stack: Factors, count: int) -> list[Factors]:
    """The factors of each layer of a stack; so are metrics that are tensors."""
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
        )
        for index in range(count)
    ]

def widened(weight: Tensor) -> Tensor:
    """The tensor in at least float32: 16-bit weights are converted before any computation."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
