"""How far a start is from its method's exact optimum, by a dense float64 decomposition.

The decomposition is torch's of a Gram matrix, independent of the library's own linear algebra.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lora_init.layers import LoraLayer
from lora_init.moments import InputStatistics

LIMITS = {"excess": 1e-4, "tail": 1e-3, "gap": 1e-5, "missing": 1e-4}
"""The most that each figure may be. They are the promises of the methods' documentation, and for
the last singular triplets ten times the angle that the solver allows a vector."""


class Exact:
    """The optima of one weight."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach().double()

    @cached_property
    def squares(self) -> Tensor:
        """The squared singular values, descending."""
        tall = self.weight if len(self.weight) > self.weight.shape[1] else self.weight.T
        return torch.linalg.eigvalsh(tall.T @ tall).flip(-1).clamp_min(0)

    def excess(self, layer: LoraLayer) -> float:
        """‖W - s B A‖ over the least that any product of this rank leaves, less 1."""
        left = (self.weight - product(layer)).norm()
        return float(left / self.squares[layer.rank :].sum().sqrt()) - 1

    def tail(self, layer: LoraLayer) -> float:
        """How much more of W than necessary lies in the span of B, for the last triplets."""
        basis = torch.linalg.qr(layer.initial_lora_B.double())[0]
        return float((basis.T @ self.weight).norm() / self.squares[-layer.rank :].sum().sqrt()) - 1

    def olora_gap(self, layer: LoraLayer) -> float:
        """‖s B A - s Q Qᵀ W‖ / ‖s Q Qᵀ W‖, Q from the first columns of W."""
        basis = torch.linalg.qr(self.weight[:, : layer.rank])[0]
        expected = layer.scaling * basis @ (basis.T @ self.weight)
        return float((product(layer) - expected).norm() / expected.norm())

    def missing_output(self, layer: LoraLayer, inputs: InputStatistics) -> float:
        """Of ‖W R‖² in the best directions of the output, the share that B does not span."""
        image = self.weight @ inputs.second_moment
        best = torch.linalg.eigvalsh(image @ image.T)[-layer.rank :].sum()
        basis = torch.linalg.qr(layer.initial_lora_B.double())[0]
        return 1 - float((basis.T @ image).square().sum() / best)


def missing_variance(layer: LoraLayer, inputs: InputStatistics) -> float:
    """Of the inputs' variance in the best directions, the share that A does not span."""
    covariance = inputs.covariance.double()
    best = torch.linalg.eigvalsh(covariance)[-layer.rank :].sum()
    basis = torch.linalg.qr(layer.initial_lora_A.double().T)[0]
    return 1 - float((basis.T @ covariance @ basis).trace() / best)


def product(layer: LoraLayer) -> Tensor:
    """s B0 A0 in float64."""
    return layer.scaling * layer.initial_lora_B.double() @ layer.initial_lora_A.double()


def figures(method: str, layer: LoraLayer, exact: Exact, inputs: InputStatistics | None) -> dict:
    """The figures that this method has an optimum for, by the names of `LIMITS`."""
    if method == "pissa":
        return {"excess": exact.excess(layer)}
    if method in ("milora", "mica"):
        return {"tail": exact.tail(layer)}
    if method == "olora":
        return {"gap": exact.olora_gap(layer)}
    if method == "eva" and inputs is not None:
        return {"missing": missing_variance(layer, inputs)}
    if method == "corda" and inputs is not None:
        return {"missing": exact.missing_output(layer, inputs)}
    return {}
