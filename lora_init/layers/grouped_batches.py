"""Batches of one or two groups of rows, which products of a CPU compute together.

A product of few rows does not fill two threads. A batched product gives each thread a group of its
own. It reads equally many rows of both groups, so groups of nearly equal size become one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PAIRED_DTYPES = torch.float32, torch.float64
"""Batched products in other dtypes have no fast kernel on many CPUs."""

MOST_PAIRED_ROWS = 128
"""A product of more rows fills the threads."""

MOST_THREADS = 4
"""With more threads, each product of a pair would use several of them."""


class Batch(NamedTuple):
    """One or two groups of a stack, with the rows that their product reads.

    Attributes:
        groups: the numbers of the groups.
        starts: the first row that is read for each group.
        length: how many rows are read for each group.
        kept: for each group, the first row that belongs to it and how many do. Other rows that are
            read belong to adjacent groups.
    """

    groups: tuple[int, ...]
    starts: tuple[int, ...]
    length: int
    kept: tuple[tuple[int, int], ...]

    @property
    def is_exact(self) -> bool:
        """Whether no row of an adjacent group is read."""
        return all(count == self.length for _, count in self.kept)

    def members(self, stack: Tensor) -> Tensor:
        """A view of the matrices of these groups."""
        first, last = self.groups[0], self.groups[-1]
        return stack[first : last + 1 : max(last - first, 1)]

    def view(self, rows: Tensor) -> Tensor:
        """A view of the rows that are read: (groups, length, columns)."""
        row, column = rows.stride()
        step = (self.starts[-1] - self.starts[0]) * row
        size = len(self.groups), self.length, rows.shape[1]
        first = rows.storage_offset() + self.starts[0] * row
        return rows.as_strided(size, (step, row, column), first)

    def output(self, rows: Tensor) -> Tensor:
        """Memory for a result: a view of its place in `rows` if the batch is exact."""
        if self.is_exact:
            return self.view(rows)
        return rows.new_empty(len(self.groups), self.length, rows.shape[1])

    def store(self, result: Tensor, rows: Tensor) -> None:
        """Copy each group's part of a result of `output` to its place in `rows`."""
        if self.is_exact:
            return
        for part, start, (first, count) in zip(result, self.starts, self.kept, strict=True):
            skipped = first - start
            rows[first : first + count] = part[skipped : skipped + count]


def batches(sizes: Sequence[int], dtype: torch.dtype) -> list[Batch]:
    """Batches of all groups that have rows. Group e has `sizes[e]` rows after those before it."""
    firsts = [0]
    for size in sizes:
        firsts.append(firsts[-1] + size)
    total = firsts[-1]
    # Neighbors in this order have the most similar sizes.
    ordered = sorted((size, group) for group, size in enumerate(sizes) if size)
    small = sum(size <= MOST_PAIRED_ROWS for size, _ in ordered)
    if dtype not in PAIRED_DTYPES or not 1 < torch.get_num_threads() <= MOST_THREADS:
        small = 0
    paired = small - small % 2
    turns = [ordered[start : start + 2] for start in range(0, paired, 2)]
    turns += [[single] for single in ordered[paired:]]
    found = []
    for turn in turns:
        length = max(size for size, _ in turn)
        groups = tuple(sorted(group for _, group in turn))
        starts = tuple(min(firsts[group], total - length) for group in groups)
        kept = tuple((firsts[group], sizes[group]) for group in groups)
        found.append(Batch(groups, starts, length, kept))
    return found


def multiply(left: Tensor, right: Tensor, into: Tensor) -> Tensor:
    """left @ right, of stacks of one or more matrices, written to this memory."""
    if len(left) == 1:
        torch.mm(left[0], right[0], out=into[0])
    else:
        torch.bmm(left, right, out=into)
    return into
