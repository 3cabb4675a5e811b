"""The peak of an injection above the loaded model, each contender in a process of its own.

On a CPU the figure is the kernel's high-water mark of resident memory (VmHWM), set back through
/proc/self/clear_refs just before the call. Where that is not allowed, it is what `ru_maxrss` rose
by: a lower bound, since loading the model has raised it before; the row says so. On a GPU it is
torch's own peak of allocated memory.

Three things would blur it. A model that is mapped from its file becomes resident as it is read, so
the weights are copied into memory first. A first call loads code and work buffers that have nothing
to do with the model, so a single layer, of the size of its largest, is adapted before. And glibc's
allocator keeps freed blocks at its discretion, so it is told to hand every large one back at once:
the figure is what is in use, and not what was (kept blocks doubled both contenders' figures on
MiniLM).
"""

from __future__ import annotations

import ctypes
import gc
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.benchmark.contenders import ADAPT, Request, our_plan, warm_up
from experiments.benchmark.isolated import run_isolated
from experiments.benchmark.ratios import paired_ratio
from experiments.benchmark.rows import Row
from experiments.benchmark.settings import BenchmarkConfig
from experiments.benchmark.subjects import load_subject
from lora_init.progress import tracked

TITLE = "peak memory of get_peft_model above the loaded model"
MIB = 2**20
CLEAR_REFS = Path("/proc/self/clear_refs")
# A fixed threshold switches off glibc's own, which grows with what is freed, up to 32 MiB.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def run(settings: BenchmarkConfig) -> list[Row]:
    cases = [(n, m) for n in settings.memory.models for m in settings.memory.methods]
    return [compare(*case, settings) for case in tracked(cases, "memory")]


def compare(name: str, method: str, settings: BenchmarkConfig) -> Row:
    """Both contenders' rise in MiB, ours beside what the plan promised."""
    told: dict[str, dict[str, Any]] = {}
    notes = []
    for contender in ADAPT:
        outcome = run_isolated(
            measure, settings, settings.memory.time_limit, ALLOCATOR,
            contender=contender, name=name, method=method,
        )  # fmt: skip
        told[contender] = outcome.reports[0] if outcome.reports else {}
        if outcome.failure:
            notes.append(f"{contender}: {outcome.failure}")
        elif told[contender]["note"] not in ("", *notes):
            notes.append(told[contender]["note"])
    ours, theirs = told["ours"].get("rise"), told["peft"].get("rise")
    promised = told["ours"].get("promised")
    comparable = ours is not None and theirs is not None and ours > 0 and theirs > 0
    return Row(
        "memory", name, method, "MiB", ours=ours, peft=theirs,
        ratio=paired_ratio([theirs], [ours]) if comparable else None,
        verdict=None if ours is None else "met" if ours <= promised else "missed",
        figures={"promised, MiB": promised, **told["ours"].get("parts", {})},
        note="; ".join(notes),
    )  # fmt: skip


def measure(
    settings: BenchmarkConfig,
    report: Callable[[dict], None],
    contender: str,
    name: str,
    method: str,
) -> None:
    """In a fresh process: load, warm up, adapt, and report the rise of the peak."""
    subject = load_subject(name, settings)
    request = Request(
        subject.settings.task, settings.rank, settings.alpha, settings.seed, method=method
    )
    settle(subject.model)
    plan = our_plan(subject.model, request)
    largest = max((target.shape for target in plan.targets), key=math.prod)
    warm_up(contender, request, largest, subject.device)
    watch = GpuPeak() if subject.device.type == "cuda" else HostPeak()
    adapted = ADAPT[contender](subject.model, request)
    rise = watch.rise()
    del adapted
    report(
        {
            "rise": rise / MIB,
            "promised": (plan.factor_bytes + plan.workspace_bytes) / MIB,
            "parts": {
                "factors, MiB": plan.factor_bytes / MIB,
                "workspace, MiB": plan.workspace_bytes / MIB,
            },
            "note": watch.note,
        }
    )


def settle(model: nn.Module) -> None:
    """Give each parameter memory of its own, in place of pages of the checkpoint's file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


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
