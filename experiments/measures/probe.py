"""Probes around an initialization: the change of the output, and the peak memory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from torch.nn import functional as F


def probe(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], mask: torch.Tensor | None
) -> torch.Tensor:
    """The logits of one fixed batch in evaluation mode, float64 on the CPU: (rows, classes)."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    with torch.inference_mode():
        logits = model(**inputs).logits
    model.train(was_training)
    return (logits if mask is None else logits[mask]).flatten(0, -2).double().cpu()


def output_gap(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """How far the model's output changed: the largest change of a logit, and the mean KL.

    KL(before || after) is a mean over rows, in nats. Rounding can make it slightly negative, so it
    is clamped at zero.
    """
    divergence = F.kl_div(
        F.log_softmax(after, -1), F.log_softmax(before, -1), log_target=True, reduction="batchmean"
    )
    return {
        "max_abs_logit": float((before - after).abs().max()),
        "kl": max(float(divergence), 0.0),
    }


class PeakMemory:
    """The highest memory use while a block runs: the GPU's, else the process's resident set.

    On Linux the kernel's high-water mark is reset first. Elsewhere that is not possible: the figure
    is then the peak since the process started, and `kind` says so.

    Attributes:
        bytes: the peak.
        held: the use when the block began, most of it the model; None where it is not known. A
            worker that has run other jobs holds more, so that only the difference is the block's.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.held: int | None = None
        self.kind = "cuda" if torch.cuda.is_available() else "resident"

    def __enter__(self) -> PeakMemory:
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self.held = resident("VmRSS")
            except OSError:
                self.kind = "resident since start"
        return self

    def __exit__(self, *exception: object) -> None:
        if self.kind == "cuda":
            self.bytes = torch.cuda.max_memory_allocated()
        elif self.kind == "resident":
            self.bytes = resident("VmHWM")
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            self.bytes = peak if sys.platform == "darwin" else peak * 1024


def resident(name: str) -> int:
    """A figure of this process in bytes: "VmRSS", its resident set, or "VmHWM", the peak of it."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
