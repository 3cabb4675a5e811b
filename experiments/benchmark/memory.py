"""The peak of an injection above the loaded model, each contender in a process of its own.

How it is taken: `peaks.py`. Two more things would blur it. A model that is mapped from its file
becomes resident as it is read, so the weights are copied into memory first. And a first call loads
code and work buffers that have nothing to do with the model, so a single layer, of the size of its
largest, is adapted before each method, which then works on a fresh copy of the model.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn

from experiments.benchmark.clock import Clock
from experiments.benchmark.contenders import ADAPT, Request, our_plan, warm_up
from experiments.benchmark.isolated import run_isolated
from experiments.benchmark.peaks import ALLOCATOR, MIB, peak_watch
from experiments.benchmark.ratios import paired_ratio
from experiments.benchmark.rows import Hear, Row, ignore
from experiments.benchmark.settings import BenchmarkConfig
from experiments.benchmark.subjects import load_subject
from lora_init.progress import tracked

TITLE = "peak memory of get_peft_model above the loaded model"


def run(settings: BenchmarkConfig, hear: Hear = ignore, clock: Clock | None = None) -> list[Row]:
    rows = []
    for name in tracked(settings.memory.models, "memory"):
        for row in compare(name, settings):
            rows.append(row)
            hear(row)
    return rows


def compare(name: str, settings: BenchmarkConfig) -> list[Row]:
    """Both contenders' rise in MiB by method, ours beside what the plan promised."""
    told: dict[tuple[str, str], dict[str, Any]] = {}
    notes: dict[str, list[str]] = defaultdict(list)
    for contender in ADAPT:
        outcome = run_isolated(
            measure, settings, settings.memory.time_limit, ALLOCATOR,
            contender=contender, name=name,
        )  # fmt: skip
        told |= {(contender, report["method"]): report for report in outcome.reports}
        for method in settings.memory.methods:
            note = told.get((contender, method), {}).get("note", f"{contender}: {outcome.failure}")
            if note not in ("", *notes[method]):
                notes[method].append(note)
    return [
        row_of(name, method, told.get(("ours", method), {}), told.get(("peft", method), {}), notes)
        for method in settings.memory.methods
    ]


def row_of(
    name: str,
    method: str,
    ours: dict[str, Any],
    peft: dict[str, Any],
    notes: dict[str, list[str]],
) -> Row:
    rise, theirs, promised = ours.get("rise"), peft.get("rise"), ours.get("promised")
    comparable = rise is not None and theirs is not None and rise > 0 and theirs > 0
    return Row(
        "memory", name, method, "MiB", ours=rise, peft=theirs,
        ratio=paired_ratio([theirs], [rise]) if comparable else None,
        verdict=None if rise is None else "met" if rise <= promised else "missed",
        figures={"promised, MiB": promised, **ours.get("parts", {})},
        note="; ".join(notes[method]),
    )  # fmt: skip


def measure(
    settings: BenchmarkConfig, report: Callable[[dict], None], contender: str, name: str
) -> None:
    """In a fresh process: load; then for each method warm up, adapt a copy, report the rise."""
    subject = load_subject(name, settings)
    settle(subject.model)
    for method in settings.memory.methods:
        request = Request(subject.task, settings.rank, settings.alpha, settings.seed, method=method)
        plan = our_plan(subject.model, request)
        largest = max((target.shape for target in plan.targets), key=math.prod)
        warm_up(contender, request, largest, subject.device)
        model = copy.deepcopy(subject.model)
        watch = peak_watch(subject.device)
        adapted = ADAPT[contender](model, request)
        rise = watch.rise()
        del adapted, model
        report(
            {
                "method": method,
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
