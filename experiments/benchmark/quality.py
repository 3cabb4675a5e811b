"""What an initialization is worth, computed independently of both contenders."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from experiments.benchmark.contenders import LayerFactors


def optimal_errors(weights: Mapping[str, Tensor], rank: int) -> dict[str, float]:
    """‖W - W_r‖ of each layer's best approximation of rank r, by a float64 SVD."""
    return {
        name: float(torch.linalg.svdvals(weight.double())[rank:].norm())
        for name, weight in weights.items()
    }


@torch.no_grad()
def worst_excess(
    weights: Mapping[str, Tensor],
    factors: Mapping[str, LayerFactors],
    optimum: Mapping[str, float],
) -> float:
    """The largest ‖W - s B A‖ / ‖W - W_r‖ - 1 over the layers; W is (out, in)."""
    worst = -1.0
    for name, layer in factors.items():
        product = layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
        error = float((weights[name].double() - product).norm())
        worst = max(worst, error / optimum[name] - 1)
    return worst


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
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
