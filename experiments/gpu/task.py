"""The context of a part: a device, a size, a time limit, and a record to fill."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .record import Record, brief


@dataclass
class Task:
    """The context in which a part runs.

    Attributes:
        device: where the work runs.
        small: use tiny sizes, to test the code itself.
        ends: the value of `time.monotonic` at which the part is killed.
    """

    record: Record
    device: torch.device
    small: bool = False
    ends: float = math.inf

    @property
    def left(self) -> float:
        """Seconds until the part is killed."""
        return self.ends - time.monotonic()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def affords(self, name: str, seconds: float) -> bool:
        """Whether `seconds` are left. If not, note that `name` was skipped."""
        if self.left >= seconds:
            return True
        self.record.note(f"{name}: skipped, {max(self.left, 0):.0f} s of the time limit are left")
        return False

    @contextmanager
    def guarded(self, name: str, *, refutes: bool = False) -> Iterator[None]:
        """Record an exception as a failed row and continue.

        Args:
            refutes: count the exception as a wrong result, because the CPU raises none.
        """
        try:
            yield
        except Exception as error:
            self.record.row(name, failed=brief(error))
            if refutes:
                self.record.refute(f"{name}: {brief(error)}")

    def timed(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of one call, and its result. The device's queue is empty before and after."""
        self.synchronize()
        start = time.perf_counter()
        result = function()
        self.synchronize()
        return time.perf_counter() - start, result

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    @contextmanager
    def peak_memory(self) -> Iterator[Callable[[], float | None]]:
        """Yield a function that returns the peak of allocated memory since now, in GiB.

        It returns None on a CPU.
        """
        self.free()
        if not self.cuda:
            yield lambda: None
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield lambda: (torch.cuda.max_memory_allocated(self.device) - before) / 2**30

    def free(self) -> None:
        """Release the memory of the last measurement."""
        if self.cuda:
            gc.collect()
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


def pick_device(small: bool) -> torch.device:
    """The current CUDA device, or the CPU for the small form.

    Raises:
        RuntimeError: the full form needs a CUDA device.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if small:
        return torch.device("cpu")
    raise RuntimeError(
        "device: no CUDA device is available. Run this on a machine with a GPU, or pass --small "
        "to run tiny sizes on the CPU."
    )
