"""How many layers are computed at a time, and on which cores.

On a CPU every matrix below `ALONE` numbers has a core of its own, and larger ones have all cores,
one after another. How many threads one gets depends on its own size only, never on what else there
is to do: results are the same to the last bit with any set of targets.

Measured on 2 CPU cores, r = 16: PiSSA of SmolLM2-135M's 210 matrices, one after another with two
threads each, takes 1.7 times as long as two at a time with one. Seven matrices of a Llama layer,
5632 × 2048 numbers the largest and 47 million in all, in ms:

|                   | pissa_niter_4 | pissa_niter_16 | pissa | milora | olora |
|---|---|---|---|---|---|
| all two at a time | 281 | 495 | 420 | 4412 | 105 |
| only the smallest | 368 | 576 | 640 | 5311 | 112 |
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
"""Of float32 weights of one shape that are on an accelerator at a time."""
ALONE = 1 << 24
"""A weight of as many numbers or more has all cores of a CPU; a smaller one has one of them. What
works on a weight may take several times its size, on each core."""
POOLED = 1 << 22
"""Work on as many numbers in all is worth a pool of threads."""


def largest_together(works: Iterable[tuple[int, float]]) -> float:
    """The most that a CPU has in memory at a time: for one large weight, or for one on each core.

    Args:
        works: of each weight, its numbers and what working on it takes.
    """
    large, small = [0.0], []
    for size, taken in works:
        (small if size < ALONE else large).append(taken)
    return max(max(large), sum(sorted(small, reverse=True)[: torch.get_num_threads()]))


def over_cores(
    work: Callable[[Item], Result], items: Sequence[Item], numbers: Callable[[Item], int | None]
) -> Iterator[Result]:
    """`work` on every item, in no particular order; an error ends the rest.

    Args:
        numbers: how large the item's matrix is; None: it is no matter of a CPU's cores.
    """
    threads = torch.get_num_threads()
    sizes = [numbers(item) for item in items]
    small = []
    for item, size in zip(items, sizes, strict=True):
        if size is not None and size < ALONE:
            small.append((size, item))
        else:
            yield _plainly(work, item)
    if not small:
        return
    if threads == 1:  # a pool of one would compute the same, later
        for _, item in small:
            yield _plainly(work, item)
        return
    if sum(size for size, _ in small) < POOLED:  # done before a pool has its threads
        torch.set_num_threads(1)
        try:
            results = [_plainly(work, item) for _, item in small]
        finally:
            torch.set_num_threads(threads)
        yield from results
        return
    # Longest first, so that no core is left with a long one at the end.
    small.sort(key=lambda pair: -pair[0])
    threaded = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    with full_precision(), threaded as pool:
        futures = [pool.submit(_plainly, work, item) for _, item in small]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            # Threads to come take the number that was set last, by whichever thread.
            torch.set_num_threads(threads)


def _plainly(work: Callable[[Item], Result], item: Item) -> Result:
    with torch.no_grad(), full_precision():  # settings of each thread
        return work(item)
