"""The peak of memory over a call, above what was in use before it.

On a CPU the figure is the kernel's high-water mark of resident memory (VmHWM), set back through
/proc/self/clear_refs just before the call. Where that is not allowed, it is what `ru_maxrss` rose
by: a lower bound, since loading the model has raised it before; the row says so. On a GPU it is
torch's own peak of allocated memory.

glibc's allocator keeps freed blocks at its discretion, which doubled both contenders' figures on
MiniLM: told to map every large block by itself, it hands each back at once, and the figure is what
is in use, and not what was. That costs time, so nothing is timed under it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

MIB = 2**20
CLEAR_REFS = Path("/proc/self/clear_refs")
# A fixed threshold switches off glibc's own, which grows with what is freed, up to 32 MiB.
MAPPED = 64 * 2**10
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(MAPPED)}
"""The environment of a process in which nothing is timed."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt
GROWN = 32 * MIB  # where glibc's own threshold ends up in a process that frees large blocks


class HostPeak:
    """Resident memory from here on: `rise()` is its peak above now, in bytes."""

    note = ""

    def __init__(self) -> None:
        gc.collect()
        release_to_system()
        try:
            CLEAR_REFS.write_text("5")  # sets the high-water mark back to what is resident now
            self.start, self.read = status("VmRSS"), lambda: status("VmHWM")
        except OSError:
            self.note = "a lower bound: the peak could not be set back after loading"
            self.read = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            self.start = self.read()

    def rise(self) -> int:
        return self.read() - self.start


class GpuPeak:
    """The same for the memory that torch allocated on the GPU."""

    note = ""

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.start = torch.cuda.memory_allocated()

    def rise(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.start


def peak_watch(device: torch.device) -> HostPeak | GpuPeak:
    return GpuPeak() if device.type == "cuda" else HostPeak()


@contextlib.contextmanager
def handing_back() -> Iterator[None]:
    """Have glibc return every large block at once in the body, and afterwards as it does by itself
    in a process that has been at work for a while.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is None:
        yield
        return
    change(M_MMAP_THRESHOLD, MAPPED)
    change(M_TRIM_THRESHOLD, 2 * MAPPED)
    try:
        yield
    finally:
        change(M_MMAP_THRESHOLD, GROWN)
        change(M_TRIM_THRESHOLD, 2 * GROWN)


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def release_to_system() -> None:
    """Freed memory that the allocator kept would hide as much of the rise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
