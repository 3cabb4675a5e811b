"""How many layers are computed at a time on a CPU, and with how many threads each.

A weight below `ALONE` numbers gets one thread, and several such weights run in parallel. A larger
weight gets all threads. The number of threads depends on the weight's own size only, so results do
not depend on the other targets, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

from lora_init.linalg.precision import full_precision

Item = TypeVar("Item")
Result = TypeVar("Result")

STACK_BYTES = 1 << 30
"""The largest stack of float32 weights of one shape on an accelerator."""
ALONE = 1 << 24
"""A weight with at least this many numbers gets all threads. The work on a weight may need several
times its memory, for each weight in progress."""
CACHED = 1 << 20
"""Numbers of a stack of experts on a CPU: it stays in the cache between two products with it."""
POOLED = 1 << 22
"""A thread pool starts for at least this many numbers in total; below, starting it costs more."""


def stack_size(numbers: int) -> int:
    """How many experts of one parameter are computed at a time on a CPU, by the size of one."""
    return max(CACHED // numbers, 1)


def largest_together(works: Iterable[tuple[int, float]]) -> float:
    """Return the peak memory on a CPU: that of one large weight, or of one small weight per thread.

    Args:
        works: for each weight, its count of numbers and the memory that the work on it needs.
    """
    large, small = [0.0], []
    for size, needed in works:
        (small if size < ALONE else large).append(needed)
    return max(max(large), sum(sorted(small, reverse=True)[: torch.get_num_threads()]))


def over_cores(
    work: Callable[[Item], Result], items: Sequence[Item], numbers: Callable[[Item], int | None]
) -> Iterator[Result]:
    """Run `work` on every item and yield results in no particular order; an error stops the rest.

    Args:
        numbers: the size of an item's matrix, or None for work on an accelerator.
    """
    threads = torch.get_num_threads()
    sized = [(numbers(item), item) for item in items]
    small = [(size, item) for size, item in sized if size is not None and size < ALONE]
    for size, item in sized:
        if size is None or size >= ALONE:
            yield _exactly(work, item)
    if threads == 1:
        yield from (_exactly(work, item) for _, item in small)
        return
    if sum(size for size, _ in small) < POOLED:
        torch.set_num_threads(1)
        try:
            results = [_exactly(work, item) for _, item in small]
        finally:
            torch.set_num_threads(threads)
        yield from results
        return
    # Longest first, so that no long item is left for the end.
    small.sort(key=lambda pair: -pair[0])
    threaded = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    with full_precision(), threaded as pool:
        futures = [pool.submit(_exactly, work, item) for _, item in small]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            # New threads inherit the number that any thread set last.
            torch.set_num_threads(threads)


def _exactly(work: Callable[[Item], Result], item: Item) -> Result:
    with torch.no_grad(), full_precision():  # each thread has its own settings
        return work(item)
