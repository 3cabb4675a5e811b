"""A loss around the present parameters: its gradient, and products with its Hessian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Curvature:
    """First and second order of a loss.

    The graph of the gradient is built once and kept, so that a product costs one pass backwards
    through it (H v = ∂ ⟨∂L, v⟩), about three forward passes. Attention must be computed by
    operations that can be differentiated twice (transformers' "eager").

    Attributes:
        gradient: of all parameters in one vector.
    """

    def __init__(self, loss: Float[Tensor, ""], parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._gradients = torch.autograd.grad(
            loss, self.parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        self.gradient = _joined(self._gradients).detach()

    def times(self, vector: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
        """H v."""
        parts = vector.split([p.numel() for p in self.parameters])
        shaped = [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]
        products = torch.autograd.grad(
            self._gradients, self.parameters, shaped, retain_graph=True, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        return _joined(products).detach()

    def along_signs(self) -> tuple[float, float]:
        """‖g‖₁ = gᵀ d and dᵀ H d for d = sign g, the direction of Adam's first step: at the rate η
        a quadratic model's loss falls by η ‖g‖₁ - η² dᵀ H d / 2.
        """
        direction = self.gradient.sign()
        return float(self.gradient.abs().sum()), float(direction @ self.times(direction))


def _joined(tensors: Sequence[Tensor]) -> Float[Tensor, " size"]:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
