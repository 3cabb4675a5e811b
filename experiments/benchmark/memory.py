"""The peak memory of `get_peft_model` above the loaded model.

Each library runs in a fresh process, whose allocator returns large blocks at once (`peaks.py`). A
first call on one layer loads code and buffers that do not depend on the model.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from .contenders import Request, adapt_ours, adapt_peft, our_plan
from .peaks import ALLOCATOR, MIB, peak_watch
from .row import OURS, PEFT, Case, Row
from .schema import BenchmarkConfig
from .timing import paired_ratio
from .workload import load_workload

TITLE = "Memory"
ADAPT = {OURS: adapt_ours, PEFT: adapt_peft}


def cases(settings: BenchmarkConfig) -> Iterator[Case]:
    for name in settings.memory.models:
        yield Case("memory", name, "all methods", partial(measure, settings, name))


def measure(settings: BenchmarkConfig, name: str) -> Iterator[Row]:
    peaks = {library: in_fresh_process(settings, name, library) for library in ADAPT}
    for method in settings.memory.methods:
        ours, peft = (peaks[library].get(method, {}) for library in ADAPT)
        rises = [found.get("rise", 0.0) for found in (peft, ours)]
        yield Row(
            "memory", name, method, settings.rank, "MiB",
            ours=ours.get("rise"), peft=peft.get("rise"), planned=ours.get("planned"),
            ratio=paired_ratio(*([rise] for rise in rises)) if min(rises) > 0 else None,
            note="; ".join({found["note"] for found in (ours, peft) if found.get("note")}),
        )  # fmt: skip


def in_fresh_process(settings: BenchmarkConfig, name: str, library: str) -> dict[str, dict]:
    """Return each method's figures, as far as the process survived."""
    os.environ.update(ALLOCATOR)  # read when a process starts, so only new processes see it
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(peaks_of, settings, name, library).result()
        except BrokenProcessPool:
            note = {"note": f"the process of {library} was killed"}
            return dict.fromkeys(settings.memory.methods, note)


def peaks_of(settings: BenchmarkConfig, name: str, library: str) -> dict[str, dict]:
    """Adapt fresh copies of the model by each method, and return the rises in MiB."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    workload, adapt, found = load_workload(name, settings), ADAPT[library], {}
    for method in settings.memory.methods:
        request = Request(
            workload.settings.task, settings.rank, settings.alpha, settings.seed, method
        )
        plan = our_plan(workload.model, request)
        rows, columns = max((target.shape for target in plan.targets), key=math.prod)
        alone = nn.Sequential(nn.Linear(columns, rows)).to(workload.device)
        adapt(alone, replace(request, task=None, names=("0",)))
        model = copy.deepcopy(workload.model)
        watch = peak_watch(workload.device)
        adapted = adapt(model, request)
        rise = watch.rise()
        del adapted, model
        planned = plan.factor_bytes + plan.workspace_bytes
        found[method] = {"rise": rise / MIB, "planned": planned / MIB, "note": watch.note}
    return found
