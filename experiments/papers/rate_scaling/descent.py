"""Full-batch Adam from one start at many learning rates at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.papers.rate_scaling.networks import Task, rectified

MOMENTS = (0.9, 0.999)
EPSILON = 1e-8
# Numbers in one block of features: what fits into a core's cache is several times as fast.
BLOCK = 2**19


@dataclass(frozen=True)
class Descent:
    """What training at each rate showed.

    Attributes:
        losses: mean squared errors before every step and after the last; may be infinite or NaN.
        projected: root mean square of A h after the last step.
        features: root mean square of s B A h after the last step.
    """

    losses: Float[Tensor, "steps rates"]
    projected: Float[Tensor, " rates"]
    features: Float[Tensor, " rates"]


def descend(
    task: Task,
    lora_A: Float[Tensor, "rank width"],
    lora_B: Float[Tensor, "out rank"],
    rates: Float[Tensor, " rates"],
    steps: int,
) -> Descent:
    """Train a copy of the factors at each rate; s = 1. As many at once as the cache holds."""
    copies = max(1, BLOCK // task.frozen.numel())
    parts = [descend_together(task, lora_A, lora_B, some, steps) for some in rates.split(copies)]
    return Descent(
        torch.cat([part.losses for part in parts], dim=1),
        torch.cat([part.projected for part in parts]),
        torch.cat([part.features for part in parts]),
    )


def descend_together(
    task: Task, lora_A: Tensor, lora_B: Tensor, rates: Float[Tensor, " rates"], steps: int
) -> Descent:
    """The same with all copies stacked: their losses are summed for the backward pass, which mixes
    nothing, and a copy that diverges leaves the others alone.
    """
    copies = len(rates)
    factors = [
        start.to(rates).expand(copies, *start.shape).clone().requires_grad_()
        for start in (lora_A, lora_B)
    ]
    state = [(torch.zeros_like(factor), torch.zeros_like(factor)) for factor in factors]
    losses = []
    for step in range(1, steps + 2):
        projected = task.inputs @ factors[0].mT
        features = projected @ factors[1].mT
        outputs = rectified(task.frozen + features) @ task.readout
        loss = (outputs - task.targets).square().mean(1)
        losses.append(loss.detach())
        if step > steps:
            break
        gradients = torch.autograd.grad(loss.sum(), factors)
        with torch.no_grad():
            for factor, gradient, moments in zip(factors, gradients, state, strict=True):
                factor.sub_(rates[:, None, None] * direction(gradient, moments, step))
    return Descent(
        torch.stack(losses),
        projected.detach().square().mean((1, 2)).sqrt(),
        features.detach().square().mean((1, 2)).sqrt(),
    )


def direction(gradient: Tensor, moments: tuple[Tensor, Tensor], step: int) -> Tensor:
    """Adam's step at a rate of 1; `moments` are updated in place."""
    first, second = moments
    first.lerp_(gradient, 1 - MOMENTS[0])
    second.mul_(MOMENTS[1]).addcmul_(gradient, gradient, value=1 - MOMENTS[1])
    unbiased = (second / (1 - MOMENTS[1] ** step)).sqrt_().add_(EPSILON)
    return (first / (1 - MOMENTS[0] ** step)).div_(unbiased)
