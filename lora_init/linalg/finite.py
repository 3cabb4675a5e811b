"""NaN and infinity, looked for in the weights that go in and in the factors that come out.

A look at a weight is one reading of it, at the memory's speed. A method that draws its factors has
no other use for the weights: they are looked at beside the drawing and whatever else is prepared,
and seen through before the model is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_init.linalg.cores import POOLED
from lora_init.linalg.streams import wait_for_writes


def is_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity."""
    # One reading at the memory's speed; only a sum beyond the type's range needs the second look.
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return math.isfinite(float(total)) or bool(torch.isfinite(values).all())


def refuse_non_finite(name: str, weight: Tensor) -> None:
    """Raises ValueError where the weight of the target `name` is not finite."""
    if not is_finite(weight):
        raise ValueError(
            f"target {name!r}: its weight holds NaN or infinite values; the checkpoint is "
            "damaged, or was read in a dtype that it overflows"
        )


@contextmanager
def refused_beside(weights: Mapping[str, Tensor]) -> Iterator[Callable[[], None]]:
    """Look at weights, by target, while the body runs.

    Yields:
        what waits for the look's end, for a body that goes on to change them.

    Raises:
        ValueError: from there, or else after the body, of the first one that is not finite.
    """

    def look() -> None:
        for name, weight in weights.items():
            refuse_non_finite(name, weight)

    if sum(weight.numel() for weight in weights.values()) < POOLED:  # done before a thread is there
        look()
        yield lambda: None
        return
    wait_for_writes(weight.device for weight in weights.values())
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        looking = pool.submit(look)
        yield looking.result
        looking.result()
