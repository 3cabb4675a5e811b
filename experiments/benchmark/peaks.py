"""The peak of memory during a call, above what was in use before it.

On a CPU this is the kernel's high-water mark of resident memory (VmHWM), which is reset through
/proc/self/clear_refs before the call. On a GPU it is torch's own peak of allocated memory.

glibc's allocator may keep freed blocks. `ALLOCATOR` makes it map and return every large block, so
that the figure is what is in use. That costs time, so nothing is timed under it.
"""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path

import torch

MIB = 2**20
CLEAR_REFS = Path("/proc/self/clear_refs")
# A fixed threshold disables glibc's own, which grows with freed blocks up to 32 MiB.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(64 * 2**10)}
"""The environment variables of a process in which nothing is timed."""


class HostPeak:
    """Watch resident memory from now on; `rise()` is its peak above now, in bytes."""

    note = ""

    def __init__(self) -> None:
        gc.collect()
        release_to_system()
        try:
            CLEAR_REFS.write_text("5")  # resets the high-water mark to what is resident now
            self.start, self.read = status("VmRSS"), lambda: status("VmHWM")
        except OSError:
            self.note = "a lower bound: the system does not allow resetting the peak"
            self.read = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            self.start = self.read()

    def rise(self) -> int:
        return self.read() - self.start


class GpuPeak:
    """Watch the memory that torch allocates on the GPU, likewise."""

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


def status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def release_to_system() -> None:
    """Return freed memory to the system: memory that glibc kept would hide as much of the rise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
