"""Which examples make a batch: a function of the seed alone, so equal for all methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class SeededBatches(Sampler[list[int]]):
    """`steps` full batches of indices, cut from consecutive permutations of all examples.

    Accelerate reads `batch_size` and `drop_last`, and splits each batch over the processes.

    Args:
        start: how many batches to skip, which were trained on before.
    """

    drop_last = True

    def __init__(
        self, examples: int, batch_size: int, steps: int, seed: int, start: int = 0
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.start = start

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        # The state of the global generator depends on the initialization.
        generator = torch.Generator().manual_seed(self.seed)
        waiting: list[int] = []
        for step in range(self.steps):
            while len(waiting) < self.batch_size:
                waiting += torch.randperm(self.examples, generator=generator).tolist()
            if step >= self.start:
                yield waiting[: self.batch_size]
            waiting = waiting[self.batch_size :]


def draw(examples: int, count: int, seed: int) -> list[int]:
    """`count` different indices (all of them if there are fewer), in a seeded order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(examples, generator=generator)[:count].tolist()


def by_length(
    lengths: Sequence[int], batch_size: int, part: tuple[int, int] = (0, 1)
) -> list[list[int]]:
    """Batches of similar lengths, which need little padding; the longest come first.

    `part` = (k, n) takes every n-th batch from the k-th on, for n processes.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[part[0] :: part[1]]
