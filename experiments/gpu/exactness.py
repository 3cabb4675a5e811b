"""How far a start is from the exact optimum of its method, by dense float64 decompositions.

The reference is torch's eigendecomposition of a Gram matrix. It shares no code with the library's
linear algebra.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_init.layers import LoraLayer
from lora_init.linalg.moments import InputStatistics

LIMITS = {"excess": 1e-4, "tail": 1e-3, "gap": 1e-5, "missing": 1e-4}
"""The most that each figure may be: the promises of the methods' documentation. `tail` may be ten
times the angle that the solver allows a vector."""


def squared_values(weight: Tensor) -> Tensor:
    """The squared singular values in float64, descending."""
    tall = weight.double() if len(weight) > weight.shape[1] else weight.double().T
    return torch.linalg.eigvalsh(tall.T @ tall).flip(-1).clamp_min(0)


def product(layer: LoraLayer) -> Tensor:
    """s B0 A0 in float64."""
    return layer.scaling * layer.initial_lora_B.double() @ layer.initial_lora_A.double()


def excess(weight: Tensor, squares: Tensor, layer: LoraLayer) -> float:
    """‖W - s B A‖ over the least that any product of this rank leaves, minus 1."""
    left = (weight - product(layer)).norm()
    return float(left / squares[layer.rank :].sum().sqrt()) - 1


def tail(weight: Tensor, squares: Tensor, layer: LoraLayer) -> float:
    """The part of W in the span of B over the smallest possible part, minus 1."""
    basis = torch.linalg.qr(layer.initial_lora_B.double())[0]
    return float((basis.T @ weight).norm() / squares[-layer.rank :].sum().sqrt()) - 1


def olora_gap(weight: Tensor, layer: LoraLayer) -> float:
    """‖s B A - s Q Qᵀ W‖ / ‖s Q Qᵀ W‖, with Q from the first columns of W."""
    basis = torch.linalg.qr(weight[:, : layer.rank])[0]
    expected = layer.scaling * basis @ (basis.T @ weight)
    return float((product(layer) - expected).norm() / expected.norm())


def missing(moment: Tensor, basis: Tensor) -> float:
    """The share of a moment's best directions that the columns of `basis` do not span."""
    best = torch.linalg.eigvalsh(moment)[-basis.shape[1] :].sum()
    basis = torch.linalg.qr(basis.double())[0]
    return 1 - float((basis.T @ moment @ basis).trace() / best)


def figures(
    method: str,
    layer: LoraLayer,
    weight: Tensor,
    squares: Tensor,
    inputs: InputStatistics | None,
) -> dict[str, float]:
    """The figures for which this method has an optimum, named as in `LIMITS`.

    Args:
        weight: in float64.
        squares: its squared singular values.
    """
    if method == "pissa":
        return {"excess": excess(weight, squares, layer)}
    if method in ("milora", "mica"):
        return {"tail": tail(weight, squares, layer)}
    if method == "olora":
        return {"gap": olora_gap(weight, layer)}
    if method == "eva" and inputs is not None:
        return {"missing": missing(inputs.covariance.double(), layer.initial_lora_A.T)}
    if method == "corda" and inputs is not None:
        image = weight @ inputs.second_moment
        return {"missing": missing(image @ image.T, layer.initial_lora_B)}
    return {}
