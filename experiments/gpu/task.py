"""What a part is given: a device, a size, a time limit, and a record to fill."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from experiments.gpu.record import Record, brief


@dataclass
class Task:
    """One part's work.

    Attributes:
        device: where the work runs.
        small: use tiny sizes, for a test of the code.
        ends: the reading of `time.monotonic` at which the part is killed.
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
        """Whether `seconds` are left. If not, a note says that `name` was skipped."""
        if self.left >= seconds:
            return True
        self.record.note(f"{name}: skipped, {max(self.left, 0):.0f} s of the time limit are left")
        return False

    @contextmanager
    def guarded(self, name: str, *, refutes: bool = False) -> Iterator[None]:
        """Record an exception as a failed row and continue.

        Args:
            refutes: the exception is a wrong result, because the CPU raises none.
        """
        try:
            yield
        except Exception as error:
            self.record.row(name, failed=brief(error))
            if refutes:
                self.record.refute(f"{name}: {brief(error)}")

    def free(self) -> None:
        """Give back the memory of the last measurement, on a device that needs it."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()


def pick_device(small: bool) -> torch.device:
    """The first CUDA device, or the CPU for the small form.

    Raises:
        RuntimeError: the full form was asked for and there is no CUDA device.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if small:
        return torch.device("cpu")
    raise RuntimeError(
        "device: no CUDA device is available. Run this on a machine with a GPU, or pass --small "
        "to run tiny sizes on the CPU."
    )
