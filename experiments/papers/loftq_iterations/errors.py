"""What a quantized layer with its adapter loses, of its weight and of its outputs.

E = W - Q - s B A is what is left. Of the weight, ‖E‖_F / ‖W‖_F; of the outputs, with R the
uncentred second moment of the layer's real inputs, the root mean square sqrt(E‖E x‖² / E‖W x‖²) =
sqrt(tr(E R Eᵀ) / tr(W R Wᵀ)).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import Calibration
from lora_init.layers import LoraLayer
from lora_init.weights.kinds import oriented_weight


def base_error(layer: LoraLayer, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """W - Q, of a layer whose base is replaced."""
    return weight - oriented_weight(layer.base_layer).float()


@torch.no_grad()
def remaining(layer: LoraLayer, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """W - Q - s B A."""
    error = base_error(layer, weight)
    return error.addmm_(layer.lora_B, layer.lora_A, alpha=-layer.scaling)


def relative_norm(error: Float[Tensor, "out in"], weight: Float[Tensor, "out in"]) -> float:
    norms = [torch.linalg.vector_norm(m, dtype=torch.float64) for m in (error, weight)]
    return float(norms[0] / norms[1])


def mean_square_output(
    matrix: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"]
) -> float:
    """tr(M R Mᵀ): the mean of ‖M x‖² over the inputs."""
    return float(((matrix @ second_moment) * matrix).sum(dtype=torch.float64))


def second_moments(calibration: Calibration, names: list[str]) -> dict[str, Float[Tensor, "in in"]]:
    """In float32, one tensor for all layers that read the same inputs."""
    by_inputs: dict[int, Tensor] = {}
    found = {}
    for name in names:
        inputs = calibration.layers[name].inputs
        if id(inputs) not in by_inputs:
            by_inputs[id(inputs)] = inputs.second_moment.float()
        found[name] = by_inputs[id(inputs)]
    return found
