"""Every width, seed and start over the same grid of learning rates; exponents; the reproduction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from experiments.console import say
from experiments.errors import RunFailed
from experiments.papers.fitting import PowerLaw, fit_power_law
from experiments.papers.rate_scaling.charts import QUANTITIES, figures, tables
from experiments.papers.rate_scaling.claims import claims, discussion
from experiments.papers.rate_scaling.descent import descend
from experiments.papers.rate_scaling.networks import NETWORKS, STARTS, draw_start, draw_task
from experiments.papers.rate_scaling.rates import (
    best_rate,
    final_losses,
    largest_stable_rate,
    peak_losses,
)
from experiments.papers.reproduction import Findings, Options
from experiments.papers.subject import place
from lora_init.progress import tracked


@dataclass
class RateScalingSettings(Options):
    """Settings.

    Attributes:
        widths: n, three or more.
        out: rows of the adapted matrix in the narrow network.
        rank: r; at least `out`, or Init[B]'s random B could not reach every row of it.
        teacher_rank: of the teacher's product.
        inputs, examples: the dimension and the number of x; each step sees them all.
        steps: of Adam, at a constant rate.
        square_seeds, narrow_seeds: networks a width, each with data, teacher and start of its own.
        compared_width, compared_ranks, compared_seeds: where the losses of the two starts are set
            side by side, in the square network.
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
        if len(set(self.widths)) < 3 or min(self.widths) < self.rank:
            raise ValueError(
                f"widths={self.widths}; allowed are three or more different widths, none below "
                f"rank={self.rank}"
            )
        if not self.compared_ranks or not 1 <= min(self.compared_ranks) <= self.compared_width:
            raise ValueError(
                f"compared_ranks={self.compared_ranks}; allowed are ranks from 1 to compared_width="
                f"{self.compared_width}"
            )
        if not 1 <= self.out <= self.rank:
            raise ValueError(f"out={self.out}; allowed are integers from 1 to rank={self.rank}")
        for name in (
            "teacher_rank", "inputs", "examples", "steps", "per_decade",
            "square_seeds", "narrow_seeds", "compared_seeds",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed are integers >= 1")
        if not 0 < self.lowest_rate < self.highest_rate < math.inf:
            raise ValueError(
                f"lowest_rate={self.lowest_rate}, highest_rate={self.highest_rate}; allowed are "
                "finite rates > 0, the lowest first"
            )

    def seeds(self, network: str) -> list[int]:
        count = self.square_seeds if network == "square" else self.narrow_seeds
        return [self.seed + offset for offset in range(count)]

    def grid(self) -> np.ndarray:
        count = round(math.log10(self.highest_rate / self.lowest_rate) * self.per_decade) + 1
        return np.geomspace(self.lowest_rate, self.highest_rate, count)


def reproduce(settings: RateScalingSettings) -> Findings:
    """Measure, fit, and judge."""
    trainings, curves = measure(settings)
    exponents = fitted(trainings)
    compared = compare(settings)
    return Findings(
        claims=claims(trainings, compared, exponents),
        setting={
            "model": "no pretrained one: y = v · φ((W + s B A) φ(U x)), rectifiers, only A and B "
            f"trained, r = {settings.rank}, s = 1, widths {settings.widths[0]} … "
            f"{settings.widths[-1]}",
            "networks": f"square: W is n × n; narrow: W is {settings.out} × n",
            "starts": "Init[A]: the registered kaiming; Init[B]: the B of random, with A = 0, "
            "which no registered method is",
            "data": f"{settings.examples} Gaussian inputs of dimension {settings.inputs}; the "
            f"teacher adds a product of rank {settings.teacher_rank}",
            "training": f"{settings.steps} steps of Adam on all examples at a constant rate, "
            f"{len(settings.grid())} rates from {settings.lowest_rate:g} to "
            f"{settings.highest_rate:g}, {settings.per_decade} a decade",
            "networks a width": f"{settings.square_seeds} square, {settings.narrow_seeds} narrow; "
            f"{settings.compared_seeds} of width {settings.compared_width} for the losses by rank",
            "the paper’s": "a teacher-student network with one adapted square matrix, and RoBERTa "
            "and Llama on language tasks, which are not measured here",
        },
        tables=tables(trainings, compared, exponents),
        figures=figures(trainings, curves),
        discussion=discussion(trainings, exponents),
    )


def measure(settings: RateScalingSettings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a network, start, width and seed; and a row of each of their rates, with its loss.

    Raises:
        RunFailed: a best or a largest stable rate beyond the grid.
    """
    rows, curves = [], []
    for network in NETWORKS:
        pairs = [(width, seed) for width in settings.widths for seed in settings.seeds(network)]
        say(f"  {network} network: {len(pairs)} of widths {settings.widths}, two starts each")
        for width, seed in tracked(pairs, f"{network} network"):
            for row, losses in trained(network, width, seed, settings.rank, settings):
                rows.append(row)
                curves += [
                    {**{key: row[key] for key in ("network", "start", "width", "seed")}, **point}
                    for point in losses
                ]
    return pd.DataFrame(rows), pd.DataFrame(curves)


def compare(settings: RateScalingSettings) -> pd.DataFrame:
    """Both starts at several ranks in the square network, a row a rank, start and seed."""
    ranks = settings.compared_ranks
    seeds = [settings.seed + offset for offset in range(settings.compared_seeds)]
    say(f"  square network of width {settings.compared_width}, ranks {ranks}")
    return pd.DataFrame(
        row | {"rank": rank}
        for rank in tracked(ranks, "ranks")
        for seed in seeds
        for row, _ in trained("square", settings.compared_width, seed, rank, settings)
    )


def trained(
    network: str, width: int, seed: int, rank: int, settings: RateScalingSettings
) -> Iterator[tuple[dict, list[dict]]]:
    """Both starts on one network: what the grid came to, and its losses."""
    device = place(settings.device)
    grid = settings.grid()
    rates = torch.tensor(grid, dtype=torch.float32, device=device)
    task = draw_task(
        network, width, seed, out=settings.out, inputs=settings.inputs,
        examples=settings.examples, teacher_rank=settings.teacher_rank,
    ).to(device)  # fmt: skip
    for start in STARTS:
        lora_A, lora_B = draw_start(start, task, rank, seed)
        found = descend(task, lora_A, lora_B, rates, settings.steps)
        final = final_losses(found.losses)
        best = best_rate(grid, final)
        stable = largest_stable_rate(grid, peak_losses(found.losses))
        for name, rate in (("best", best), ("largest stable", stable)):
            if rate.at_edge:
                raise RunFailed(
                    f"the {name} rate of Init[{start}], {network} network of width {width}, lies "
                    f"beyond the grid; widen lowest_rate={settings.lowest_rate:g}"
                    f" … highest_rate={settings.highest_rate:g}",
                    reason="grid",
                )
        yield (
            {
                "network": network, "start": start, "width": width, "seed": seed,
                "best": best.value, "stable": stable.value, "loss": float(final[best.index]),
                "projected": float(found.projected[best.index]),
                "features": float(found.features[best.index]),
            },
            [
                {"rate": float(rate), "loss": float(loss)}
                for rate, loss in zip(grid, final, strict=True)
            ],
        )  # fmt: skip


def fitted(trainings: pd.DataFrame) -> dict[tuple[str, str, str], PowerLaw]:
    """By network, start and quantity: its exponent in the width, over all widths and seeds."""
    return {
        (network, start, quantity): fit_power_law(some["width"].tolist(), some[quantity].tolist())
        for (network, start), some in trainings.groupby(["network", "start"])
        for quantity in QUANTITIES
    }
