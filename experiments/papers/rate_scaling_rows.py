"""The rows of Init[A] and Init[B]: two networks trained by Adam at every learning rate of a grid.

Teacher and student are y = v · φ((W + s B A) φ(U x)); everything but A and B is frozen. The teacher
has its own product B* A* in place of s B A, whose rows are as large as those of W h. φ is the
rectifier times √2, which keeps the mean square: every coordinate of h = φ(U x), of W h and of
B* A* h, and the output, have size 1 at any width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import init_factors
from lora_init.layer import layer_generator
from lora_init.progress import tracked

from ..console import say
from ..errors import RunFailed
from .reproduction import Measurement, Options, require, require_at_least
from .subject import place

NETWORKS = ("square", "narrow")
STARTS = ("A", "B")
MOMENTS = (0.9, 0.999)
EPSILON = 1e-8
BLOCK = 2**19  # numbers in one block of features, which fits into a core's cache
LIMIT = 2.0  # a rate is stable while the loss stays below this multiple of the first loss
LAST = 0.2  # the share of the steps in the final loss


@dataclass
class RateScalingOptions(Options):
    """What is trained.

    Attributes:
        widths: n, three or more.
        out: rows of the adapted matrix in the narrow network.
        rank: r, at least `out`: Init[B]'s random B must reach every row.
        teacher_rank: of the teacher's product.
        inputs, examples: the dimension and the number of x; each step uses all of them.
        steps: of Adam, at a constant rate.
        square_seeds, narrow_seeds: networks per width, each with its own data, teacher and start.
        compared_width, compared_ranks, compared_seeds: square networks for the losses by rank.
        lowest_rate, highest_rate, per_decade: the grid, the same for every width and start.
    """

    widths: list[int] = field(default_factory=lambda: [128, 256, 512, 1024, 2048, 4096])
    out: int = 8
    rank: int = 8
    teacher_rank: int = 4
    inputs: int = 16
    examples: int = 64
    steps: int = 50
    square_seeds: int = 3
    narrow_seeds: int = 8
    compared_width: int = 256
    compared_ranks: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    compared_seeds: int = 6
    lowest_rate: float = 3e-5
    highest_rate: float = 0.3
    per_decade: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "teacher_rank", "inputs", "examples", "steps", "per_decade")
        require_at_least(self, 1, "square_seeds", "narrow_seeds", "compared_seeds")
        enough = len(set(self.widths)) >= 3 and min(self.widths) >= self.rank
        wanted = f"three or more different widths, none below rank={self.rank}"
        require(self, "widths", enough, wanted)
        ranks, width = self.compared_ranks, self.compared_width
        fits = bool(ranks) and 1 <= min(ranks) <= width
        require(self, "compared_ranks", fits, f"ranks from 1 to compared_width={width}")
        require(self, "out", 1 <= self.out <= self.rank, f"from 1 to rank={self.rank}")
        rising = 0 < self.lowest_rate < self.highest_rate < math.inf
        wanted = f"above 0 and below highest_rate={self.highest_rate}, which must be finite"
        require(self, "lowest_rate", rising, wanted)

    def seeds(self, network: str) -> list[int]:
        count = self.square_seeds if network == "square" else self.narrow_seeds
        return [self.seed + offset for offset in range(count)]

    def grid(self) -> np.ndarray:
        count = round(math.log10(self.highest_rate / self.lowest_rate) * self.per_decade) + 1
        return np.geomspace(self.lowest_rate, self.highest_rate, count)


@dataclass(frozen=True)
class Task:
    """The frozen part of a network, and its data.

    Attributes:
        inputs: h, of the adapted layer.
        frozen: W h, computed once: a step then costs O(width · rank) an example.
        readout: v.
        targets: the outputs of the teacher.
    """

    inputs: Float[Tensor, "examples width"]
    frozen: Float[Tensor, "examples out"]
    readout: Float[Tensor, " out"]
    targets: Float[Tensor, " examples"]

    def to(self, device: torch.device) -> Task:
        return Task(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def rectified(values: Tensor) -> Tensor:
    """√2 · max(0, x), which keeps the mean square of symmetric values."""
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

    "A" is the registered `kaiming`: A ~ U(±1/√n), B = 0. "B" is the B of `random`, U(±1/√r), with
    A = 0, which no registered method has. Both random factors have a variance of 1 / (3 · fan-in),
    a third of the paper's.
    """
    width, out = task.inputs.shape[1], task.frozen.shape[1]
    # Neither method reads the weight, so no memory is spent on its entries.
    weight = torch.zeros(1, 1).expand(out, width)
    method = "kaiming" if start == "A" else "random"
    factors = init_factors(weight, method, r=rank, seed=seed, name=f"start {width}")
    lora_A = factors.lora_A if start == "A" else torch.zeros(rank, width)
    return lora_A, factors.lora_B


@dataclass(frozen=True)
class Descent:
    """Training at each rate.

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
    """Train all copies stacked. Their losses are summed for the backward pass, which mixes
    nothing: a copy that diverges leaves the others alone.
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
    """Adam's step at a rate of 1; updates `moments` in place."""
    first, second = moments
    first.lerp_(gradient, 1 - MOMENTS[0])
    second.mul_(MOMENTS[1]).addcmul_(gradient, gradient, value=1 - MOMENTS[1])
    unbiased = (second / (1 - MOMENTS[1] ** step)).sqrt_().add_(EPSILON)
    return (first / (1 - MOMENTS[0] ** step)).div_(unbiased)


@dataclass(frozen=True)
class Rate:
    """A learning rate read off a grid.

    Attributes:
        index: of the grid's rate at or below it.
        at_edge: the grid ends before the rate is decided.
    """

    value: float
    index: int
    at_edge: bool


def final_losses(losses: Float[Tensor, "steps rates"]) -> Float[np.ndarray, " rates"]:
    """The mean of the last fifth of the losses over the first loss; infinite if it diverged."""
    count = max(1, round(LAST * len(losses)))
    share = (losses[-count:].double().mean(0) / losses[0].double()).cpu().numpy()
    return np.nan_to_num(share, nan=np.inf, posinf=np.inf)


def peak_losses(losses: Float[Tensor, "steps rates"]) -> Float[np.ndarray, " rates"]:
    """The largest loss over the first loss; infinite if it diverged."""
    share = (losses.double() / losses[0].double()).cpu().numpy()
    return np.nan_to_num(share, nan=np.inf, posinf=np.inf).max(axis=0)


def best_rate(rates: Float[np.ndarray, " rates"], final: Float[np.ndarray, " rates"]) -> Rate:
    """The rate of the least loss.

    It is the vertex of the parabola, in logarithms, through the grid's least loss and both
    neighbors, which resolves more than the grid's spacing.
    """
    place = int(np.argmin(final))
    if place in (0, len(rates) - 1):
        return Rate(float(rates[place]), place, True)
    left, middle, right = np.log(final[place - 1 : place + 2])
    step = math.log(rates[place] / rates[place - 1])
    bend = left - 2 * middle + right
    # A neighbor that diverged has an infinite logarithm; the grid's rate is then used.
    offset = 0.5 * (left - right) / bend if math.isfinite(bend) and bend > 0 else 0.0
    return Rate(float(rates[place] * math.exp(offset * step)), place, False)


def largest_stable_rate(
    rates: Float[np.ndarray, " rates"], peaks: Float[np.ndarray, " rates"], limit: float = LIMIT
) -> Rate:
    """The largest rate up to which the loss never exceeds `limit` times its first value.

    Between two rates of the grid a line through the logarithms decides.
    """
    above = np.flatnonzero(peaks > limit)
    if len(above) == 0:
        return Rate(float(rates[-1]), len(rates) - 1, True)
    place = int(above[0])
    if place == 0:
        return Rate(float(rates[0]), 0, True)
    low, high = np.log(peaks[place - 1]), np.log(peaks[place])
    part = (math.log(limit) - low) / (high - low) if math.isfinite(high) else 0.0
    step = math.log(rates[place] / rates[place - 1])
    return Rate(float(rates[place - 1] * math.exp(part * step)), place - 1, False)


def measure(options: RateScalingOptions) -> Measurement:
    """Train every network from both starts at every rate.

    Raises:
        RunFailed: a best or a largest stable rate is beyond the grid.
    """
    rows, curves = [], []
    for network in NETWORKS:
        pairs = [(width, seed) for width in options.widths for seed in options.seeds(network)]
        say(f"  {network} network: {len(pairs)} of widths {options.widths}, two starts each")
        for width, seed in tracked(pairs, f"{network} network"):
            for row, losses in trained(network, width, seed, options.rank, options):
                rows.append(row)
                case = {key: row[key] for key in ("network", "start", "width", "seed")}
                points = zip(options.grid().tolist(), losses, strict=True)
                curves += [case | {"rate": rate, "loss": loss} for rate, loss in points]
    width, ranks = options.compared_width, options.compared_ranks
    say(f"  square network of width {width}, ranks {ranks}")
    compared = [
        row | {"rank": rank}
        for rank in tracked(ranks, "ranks")
        for seed in range(options.seed, options.seed + options.compared_seeds)
        for row, _ in trained("square", width, seed, rank, options)
    ]
    frames = {"trainings": rows, "curves": curves, "compared": compared}
    facts = {
        "model": "no pretrained one: y = v · φ((W + s B A) φ(U x)), rectifiers, only A and B "
        "trained, s = 1; square: W is n × n; narrow: W is out × n",
        "starts": "Init[A]: the registered kaiming; Init[B]: the B of random, with A = 0",
        "the paper’s": "a teacher-student network with one adapted square matrix, and RoBERTa "
        "and Llama on language tasks, which are not measured here",
    }
    return Measurement(options, {name: pd.DataFrame(f) for name, f in frames.items()}, facts)


def trained(
    network: str, width: int, seed: int, rank: int, options: RateScalingOptions
) -> Iterator[tuple[dict, list[float]]]:
    """The rates and sizes of both starts on one network, and their final losses over the grid."""
    device = place(options.device)
    grid = options.grid()
    rates = torch.tensor(grid, dtype=torch.float32, device=device)
    task = draw_task(
        network,
        width,
        seed,
        out=options.out,
        inputs=options.inputs,
        examples=options.examples,
        teacher_rank=options.teacher_rank,
    ).to(device)
    for start in STARTS:
        lora_A, lora_B = draw_start(start, task, rank, seed)
        found = descend(task, lora_A, lora_B, rates, options.steps)
        final = final_losses(found.losses)
        best = best_rate(grid, final)
        stable = largest_stable_rate(grid, peak_losses(found.losses))
        for name, rate in (("best", best), ("largest stable", stable)):
            if rate.at_edge:
                raise RunFailed(
                    f"the {name} rate of Init[{start}], {network} network of width {width}, is "
                    f"beyond the grid; widen lowest_rate={options.lowest_rate:g}"
                    f" … highest_rate={options.highest_rate:g}",
                    reason="grid",
                )
        row = {
            "network": network,
            "start": start,
            "width": width,
            "seed": seed,
            "best": best.value,
            "stable": stable.value,
            "loss": float(final[best.index]),
            "projected": float(found.projected[best.index]),
            "features": float(found.features[best.index]),
        }
        yield row, final.tolist()
