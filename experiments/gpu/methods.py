"""Every method on Llama-2-7B's shapes in bfloat16: time, memory, waits for the device, quality.

The first pass initializes one block at each rank, so that every method has a figure. The second
pass takes eight blocks, the most important methods first, until the time limit. Figures for the
whole model are scaled from the measured blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lora_init import Calibration, LoraConfig, LoraModel, calibrate, get_peft_model
from lora_init.initialize import run as initialization
from lora_init.registry import list_initializers, resolve

from . import exactness
from .blocks import LLAMA_2_7B, TINY, Shape, llama, targets, token_batches
from .lifecycle import relative
from .specimens import data_of
from .task import Task
from .waits import LISTED, counted_waits

FIRST = (
    "kaiming", "pissa", "pissa_niter_4", "olora", "eva", "corda", "milora", "loftq", "lora_ga",
    "qpissa", "qera", "corda_kpm", "lora_null", "mica",
)  # fmt: skip
SETTINGS = {
    "corda_kpm": {"name": "corda", "corda_method": "kpm"},
    "eva": {"name": "eva", "rho": 1.0},
    "gora": {"name": "gora", "smallest": 1.0, "largest": 1.0},
}
"""Variants by name, and options under which a method keeps the given ranks."""
BLOCKS = 8
SPREAD = 1.3  # of a predicted time
PHASES = {"read": "_input", "decompose": "_computed", "copy": "_settled"}
"""The phases of an initialization, and the methods of `_Worker` in `lora_init.initialize.run`."""


@dataclass
class Subject:
    """The model, with one layer whose singular values are known."""

    model: nn.Module
    shape: Shape
    sampled: str
    weight: Tensor
    squares: Tensor


def methods() -> list[str]:
    """All methods, the most important first."""
    return list(dict.fromkeys([*FIRST, *(spec.name for spec in list_initializers())]))


def run(task: Task) -> None:
    shape, ranks = (TINY, (4,)) if task.small else (LLAMA_2_7B, (16, 128))
    blocks = 1 if task.small else BLOCKS
    dtype = torch.float32 if task.small else torch.bfloat16
    seconds, model = task.timed(lambda: llama(shape, blocks, task.device, dtype))
    task.record.row(f"{blocks} synthetic blocks of {shape.name}", build_seconds=seconds)
    sampled = targets(1)[0]
    weight = model.get_submodule(sampled).weight.detach().double()
    subject = Subject(model, shape, sampled, weight, exactness.squared_values(weight))
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for method in methods()[:6] if task.small else methods():
        if task.affords(method, 5):
            with task.guarded(method):
                for rank in ranks:
                    rows[method, rank] = watched(task, subject, method, rank)
            task.free()
    for method in methods() if blocks > 1 else ():
        wanted = {rank: rows[method, rank] for rank in ranks if (method, rank) in rows}
        needed = SPREAD * blocks * sum(row["call_seconds"] for row in wanted.values())
        if wanted and needed < task.left - 2:
            with task.guarded(f"{method}, {blocks} blocks"):
                for rank, row in wanted.items():
                    row.update(measured(task, subject, method, rank, blocks)[0])
                    task.record.write()
            task.free()
    task.record.note("weights are synthetic: power-law spectra, s_i = s_1 i^-0.7")


def watched(task: Task, subject: Subject, method: str, rank: int) -> dict[str, Any]:
    """One block twice: first with phases and waits, which also loads kernels; then undisturbed."""
    found = statistics(task, subject, method, 1)
    start = adapted(subject, method, rank, targets(1), found)
    with timed_phases(task) as phases, counted_waits() as waits, start as model:
        inject = spent(model)["inject"]
    figures, judged = measured(task, subject, method, rank, 1, judge=True)
    return task.record.row(
        f"{method} r={rank}",
        **figures,
        **{f"{phase}_seconds": value for phase, value in phases.items()},
        inject_seconds=inject,
        waits=sum(waits.values()),
        waits_by_line=dict(waits.most_common(LISTED)),
        **judged,
    )


def measured(
    task: Task, subject: Subject, method: str, rank: int, blocks: int, judge: bool = False
) -> tuple[dict[str, Any], dict[str, float]]:
    """Seconds and peak memory of one call, also scaled to the whole model; then its quality.

    Statistics are collected again for every call, because decompositions stay in them.
    """
    found = statistics(task, subject, method, blocks)
    with task.peak_memory() as peak, ExitStack() as stack:
        start = adapted(subject, method, rank, targets(blocks), found)
        call, model = task.timed(lambda: stack.enter_context(start))
        peak_gib = peak()
        taken = spent(model)
        judged = quality(task, subject, method, model, found) if judge else {}
    seconds = taken["allocation"] + taken["initialize"] + taken["inject"]
    figures = {
        "blocks": blocks,
        "seconds": seconds,
        "call_seconds": call,
        "model_seconds": subject.shape.blocks / blocks * seconds,
        "peak_gib": peak_gib,
    }
    return figures, judged


def spent(model: LoraModel) -> dict[str, float]:
    """Seconds by step. `init_report()` has them too, but measures every layer first."""
    return model._report.seconds


@contextmanager
def timed_phases(task: Task) -> Iterator[dict[str, float]]:
    """Seconds by phase of what runs inside. Each step waits for the device, so that their sum is
    larger than the undisturbed time."""
    seconds: dict[str, float] = defaultdict(float)
    worker = getattr(initialization, "_Worker", None)

    def watch(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            taken, result = task.timed(lambda: function(*arguments, **named))
            seconds[phase] += taken
            return result

        return call

    with ExitStack() as stack:
        for phase, name in PHASES.items():
            if hasattr(worker, name):
                step = watch(phase, getattr(worker, name))
                stack.enter_context(patch.object(worker, name, step))
        yield seconds


@contextmanager
def adapted(
    subject: Subject, method: str, rank: int, names: list[str], found: Calibration | None
) -> Iterator[LoraModel]:
    """The model with the adapter inside the context, and without it afterwards."""
    settings = SETTINGS.get(method, method)
    config = LoraConfig(r=rank, target_modules=names, init_lora_weights=settings)
    model = get_peft_model(
        subject.model, config, calibration=found, keep_original=True, cache=False
    )
    try:
        yield model
    finally:
        model.unload()


def statistics(task: Task, subject: Subject, method: str, blocks: int) -> Calibration | None:
    """The statistics of random tokens that the method needs; None if it needs none."""
    settings = SETTINGS.get(method, method)
    if not resolve(settings)[0].needs_data:
        return None
    config = LoraConfig(r=1, target_modules=targets(blocks), init_lora_weights=settings)
    batches = token_batches(subject.shape, 2, 2, 32 if task.small else 2048, task.device)
    return calibrate(subject.model, config, data_of(resolve(settings)[0], batches))


def quality(
    task: Task, subject: Subject, method: str, model: LoraModel, found: Calibration | None
) -> dict[str, float]:
    """The sampled layer compared with the exact optimum, and its output at step 0."""
    layer = model.layers[subject.sampled]
    inputs = None if found is None else found.layers[subject.sampled].inputs
    figures = exactness.figures(method, layer, subject.weight, subject.squares, inputs)
    limits = dict(exactness.LIMITS)
    spec, _ = resolve(SETTINGS.get(method, method))
    if spec.preserves_output and layer.base_state in ("kept", "in_forward"):
        x = torch.randn(64, layer.in_features, device=task.device).to(layer.base_layer.weight)
        with torch.no_grad():
            figures["step_0"] = relative(layer(x), layer.base_layer(x))
        ratio = float(exactness.product(layer).norm() / subject.weight.norm())
        limits["step_0"] = torch.finfo(x.dtype).eps * max(1.0, ratio)
    if spec.base == "replace":
        (row,) = [row for row in model.init_report().layers if row.name == subject.sampled]
        figures["error"] = row.error
        limits["error"] = row.details.get("error_without_adapter", float("inf"))
    for name, value in figures.items():
        if not value <= limits[name]:
            task.record.refute(
                f"{method} r={layer.rank}: {name} is {value:.3g}, must be at most "
                f"{limits[name]:.3g}"
            )
    return figures
