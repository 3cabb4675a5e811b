"""Teacher and student: y = v · φ((W + s B A) φ(U x)), everything frozen but A and B.

The teacher is the same network with a product B* A* of its own in the place of s B A, whose rows
are as large as those of W h. φ is the rectifier times √2, which keeps the mean square, so that
every coordinate of h = φ(U x), of W h and of B* A* h, and the output, is of size 1 at any width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.layer import layer_generator
from lora_init.registry import get_initializer

NETWORKS = ("square", "narrow")
STARTS = ("A", "B")


@dataclass(frozen=True)
class Task:
    """Everything about a network and its data that no step changes.

    Attributes:
        inputs: h, of the adapted layer.
        frozen: W h, computed once: a step then costs O(width · rank) an example.
        readout: v.
        targets: what the teacher answers.
    """

    inputs: Float[Tensor, "examples width"]
    frozen: Float[Tensor, "examples out"]
    readout: Float[Tensor, " out"]
    targets: Float[Tensor, " examples"]

    def to(self, device: torch.device) -> Task:
        return Task(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def rectified(values: Tensor) -> Tensor:
    """√2 · max(0, x): the mean square of symmetric values stays."""
    return torch.relu(values) * 2**0.5


def draw_task(
    network: str, width: int, seed: int, *, out: int, inputs: int, examples: int, teacher_rank: int
) -> Task:
    """Draw a network, its data and its teacher.

    Args:
        network: "square", whose adapted matrix is width × width; "narrow", where it is out × width.
        inputs: the dimension of x.
    """
    generator = layer_generator(seed, f"{network} {width}")

    def normal(*shape: int, fan_in: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / fan_in**0.5

    rows = width if network == "square" else out
    data = normal(examples, inputs, fan_in=1)
    hidden = rectified(data @ normal(width, inputs, fan_in=inputs).T)
    frozen = hidden @ normal(rows, width, fan_in=width).T
    readout = normal(rows, fan_in=rows)
    lora_A = normal(teacher_rank, width, fan_in=width)
    lora_B = normal(rows, teacher_rank, fan_in=teacher_rank)
    targets = rectified(frozen + hidden @ lora_A.T @ lora_B.T) @ readout
    return Task(hidden, frozen, readout, targets)


def draw_start(
    start: str, task: Task, rank: int, seed: int
) -> tuple[Float[Tensor, "rank width"], Float[Tensor, "out rank"]]:
    """A and B at step 0.

    "A" is the registered `kaiming`: A ~ U(±1/√n), B = 0. No registered method starts the other way
    round; "B" is the B of `random`, U(±1/√r), with A = 0. Both random factors have a variance of
    1 / (3 · fan-in), which is a third of the paper's, for both alike.
    """
    width, out = task.inputs.shape[1], task.frozen.shape[1]
    # Neither method reads a weight, so its shape is all they get.
    weight = torch.empty(out, width, device="meta")
    spec = get_initializer("kaiming" if start == "A" else "random")
    factors = spec.function(
        weight, rank, 1.0, None, spec.options(), layer_generator(seed, f"start {width}")
    )
    lora_A = factors.lora_A if start == "A" else torch.zeros(rank, width)
    return lora_A, factors.lora_B
