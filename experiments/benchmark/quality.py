"""What an initialization is worth, computed independently of both contenders."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiments.benchmark.contenders import LayerFactors


@torch.no_grad()
def excess(
    matrix: Float[Tensor, "m n"],
    approximation: Float[Tensor, "m n"],
    left: Float[Tensor, "m r"],
) -> float:
    """‖M - approximation‖ / ‖M - U_r U_rᵀ M‖ - 1, U_r the first left singular vectors: 0 is best.

    A subspace that is off by ε makes the optimum larger by ε² only.
    """
    optimum = distance(matrix, left @ (left.T @ matrix))
    return distance(matrix, approximation) / optimum - 1


@torch.no_grad()
def overlap(found: Float[Tensor, "n k"], exact: Float[Tensor, "n r"]) -> float:
    """The mean squared cosine of the angles between two subspaces, 1 where they are the same."""
    first, second = (torch.linalg.qr(basis.double())[0] for basis in (found, exact))
    return float((first.T @ second).square().sum() / min(found.shape[1], exact.shape[1]))


@torch.no_grad()
def difference(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖ / ‖exact‖."""
    return distance(found.double(), exact.double()) / float(exact.double().norm())


def distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm())


@torch.no_grad()
def product(layer: LayerFactors) -> Float[Tensor, "out in"]:
    """s B A in float64."""
    return layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())


@torch.no_grad()
def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's logits in evaluation mode, where the mask says that they mean something."""
    was_training = model.training
    model.eval()
    given = {key: value for key, value in batch.items() if key != "labels"}
    result = model(**given).logits
    model.train(was_training)
    return result[given["attention_mask"].bool()] if result.ndim == 3 else result


def output_gap(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    return difference(actual, expected)
