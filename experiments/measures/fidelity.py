"""How closely the first step follows the gradient of the whole weights.

With G = dL/dW (m × n), the factors B (m × r), A (r × n) and the scaling s, one step of SGD at rate
η changes

    ΔB = -η s G Aᵀ,   ΔA = -η s Bᵀ G,   so that   s(ΔB A + B ΔA) = -η s² U,
    U = G Aᵀ A + B Bᵀ G,

up to η², where full fine-tuning goes along -G. With a core R between frozen factors, the step is
along U = B Bᵀ G Aᵀ A. The distance of U from G at the best length c of the step,

    min_c ‖c U - G‖ / ‖G‖ = sqrt(1 - <U, G>² / (‖U‖² ‖G‖²)),

is the sine of the angle between them: 0 follows G, 1 is perpendicular to it. U is never formed: it
is a product of two thin matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import LoraModel
from lora_init.calibration.gradients import collect_gradients
from lora_init.layers import LoraLayer
from lora_init.layers.linear import LinearLayer

from .originals import spread

Product = tuple[Float[Tensor, "out inner"], Float[Tensor, "inner in"]]
"""Two matrices that stand for their product."""


def first_step(
    rule: str,
    gradient: Float[Tensor, "out in"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    frozen: Sequence[str] = (),
) -> Product:
    """U of one step of "sgd" or "adam", in float64; a factor in `frozen` does not move.

    Adam's first step takes the signs: U = sign(G Aᵀ) A + B sign(Bᵀ G).
    """
    gradient, lora_A, lora_B = gradient.double(), lora_A.double(), lora_B.double()
    move_B, move_A = gradient @ lora_A.T, lora_B.T @ gradient
    if rule == "adam":
        move_B, move_A = move_B.sign(), move_A.sign()
    parts = {"lora_B": (move_B, lora_A), "lora_A": (lora_B, move_A)}
    left, right = zip(*(part for name, part in parts.items() if name not in frozen), strict=True)
    return torch.cat(left, dim=1), torch.cat(right)


def relative_error(step: Product, wanted: Float[Tensor, "out in"]) -> float:
    """min over c ≥ 0 of ‖c U - G‖ / ‖G‖; 1 if U is zero or points away from G.

    Raises:
        ValueError: the gradient is zero.
    """
    return sine([products(step, wanted)])


def products(step: Product, wanted: Float[Tensor, "out in"]) -> tuple[float, float, float]:
    """‖U‖², <U, G> and ‖G‖², in float64."""
    left, right = (factor.double() for factor in step)
    wanted = wanted.double()
    square = float(((left.T @ left) * (right @ right.T)).sum())
    return square, float(((left.T @ wanted) * right).sum()), float(wanted.square().sum())


def sine(found: Iterable[tuple[float, float, float]]) -> float:
    """The relative error of all layers' steps together, with one c, from their `products`."""
    square, product, norm = map(sum, zip(*found, strict=True))
    if norm == 0:
        raise ValueError("a gradient of zero is not supported: no step follows it.")
    if square <= 0 or product <= 0:
        return 1.0
    return max(0.0, 1 - product**2 / (square * norm)) ** 0.5


def first_step_error(
    model: LoraModel,
    targets: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    layers: int | None,
) -> float | None:
    """The relative error of the first step of SGD, some layers together; None if there are none.

    Args:
        model: at its start. It is run in evaluation mode, forward and backward.
        targets: the layers that were to be adapted. One without an adapter has U = 0.
        batches: with labels; G is the mean over them.
        layers: as many of the linear targets, evenly spaced; None for all. Layers with DoRA are
            left out, because their step is another one.

    Raises:
        ValueError: a gradient is not finite, all are zero, or a layer is never reached.
    """
    base = model.get_base_model()
    wanted = set(targets)
    modules = {name: module for name, module in base.named_modules() if name in wanted}
    known = [name for name, module in modules.items() if follows(module)]
    inner = {
        f"{name}.base_layer" if isinstance(modules[name], LoraLayer) else name: name
        for name in spread(known, layers)
    }
    if not inner:
        return None
    gradients = collect_gradients(base, inner, batches)
    return sine(steps(modules[inner[name]], gradient) for name, gradient in gradients.items())


def follows(module: torch.nn.Module) -> bool:
    """Whether the formulas hold for a target."""
    if not isinstance(module, LoraLayer):
        return isinstance(module, torch.nn.Linear)
    return isinstance(module, LinearLayer) and not module.use_dora


@torch.no_grad()
def steps(module: torch.nn.Module, gradient: Float[Tensor, "out in"]) -> tuple[float, float, float]:
    """The `products` of s² U and G of one layer."""
    if not isinstance(module, LoraLayer):
        return 0.0, 0.0, float(gradient.double().square().sum())
    lora_A, lora_B = module.lora_A.double(), module.lora_B.double()
    if module.lora_core is not None:
        step = lora_B, lora_B.T @ gradient.double() @ lora_A.T @ lora_A
    else:
        factors = {"lora_A": module.lora_A, "lora_B": module.lora_B}
        frozen = [name for name, factor in factors.items() if not factor.requires_grad]
        step = first_step("sgd", gradient, lora_A, lora_B, frozen)
    square, product, norm = products(step, gradient)
    return module.scaling**4 * square, module.scaling**2 * product, norm
