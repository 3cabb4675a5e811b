"""Every method on Llama-2-7B's shapes in bfloat16: time, memory, waits for the device, quality.

The first pass initializes one block at each rank, so that every method has a figure. A second pass
takes eight blocks, methods in the order of their worth, until the time limit. Figures for the whole
model are scaled from the blocks that were measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from experiments.benchmark.peaks import peak_watch
from experiments.gpu import exactness
from experiments.gpu.blocks import LLAMA_2_7B, TINY, Shape, llama, targets, token_batches
from experiments.gpu.lifecycle import relative
from experiments.gpu.phases import timed_phases
from experiments.gpu.stopwatch import timed
from experiments.gpu.synchronizations import counted_synchronizations
from experiments.gpu.task import Task
from lora_init import Calibration, LoraConfig, LoraModel, calibrate, get_peft_model
from lora_init.layer import LayerStatistics
from lora_init.moments import InputStatistics
from lora_init.registry import list_initializers, resolve

WORTH = (
    "kaiming", "pissa", "pissa_niter_4", "olora", "eva", "corda", "milora", "loftq", "lora_ga",
    "qpissa", "qera", "corda_kpm", "lora_null", "mica",
)  # fmt: skip
SPELLED = {
    "corda_kpm": {"name": "corda", "corda_method": "kpm"},
    "eva": {"name": "eva", "rho": 1.0},
    "gora": {"name": "gora", "smallest": 1.0, "largest": 1.0},
}
BLOCKS = 8
SPREAD = 1.3  # of a prediction
LINES = 12  # of the waits that are listed


@dataclass
class Subject:
    """The model, and what is known exactly about one of its layers."""

    model: nn.Module
    shape: Shape
    sampled: str
    exact: exactness.Exact


def methods() -> list[str]:
    """All methods, those that are worth most first."""
    known = [spec.name for spec in list_initializers()]
    return [*WORTH, *(name for name in known if name not in WORTH)]


def run(task: Task) -> None:
    shape, ranks = (TINY, (4,)) if task.small else (LLAMA_2_7B, (16, 128))
    blocks = 1 if task.small else BLOCKS
    dtype = torch.float32 if task.small else torch.bfloat16
    seconds, model = timed(lambda: llama(shape, blocks, task.device, dtype), task.device)
    task.record.row(f"{blocks} synthetic blocks of {shape.name}", build_seconds=seconds)
    sampled = targets(1)[0]
    exact = exactness.Exact(model.get_submodule(sampled).weight)
    subject = Subject(model, shape, sampled, exact)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for method in methods()[:6] if task.small else methods():
        if not task.affords(method, 5):
            continue
        with task.guarded(method):
            found = statistics(task, subject, method, 1)
            for rank in ranks:
                rows[method, rank] = once(task, subject, method, rank, found)
        task.free()
    for method in methods() if blocks > 1 else ():
        wanted = {rank: rows[method, rank] for rank in ranks if (method, rank) in rows}
        needed = SPREAD * blocks * sum(row["call_seconds"] for row in wanted.values())
        if wanted and needed < task.left - 2:
            with task.guarded(f"{method}, {blocks} blocks"):
                found = statistics(task, subject, method, blocks)
                for rank, row in wanted.items():
                    row.update(measured(task, subject, method, rank, blocks, found)[0])
                    task.record.write()
            task.free()
    task.record.note("weights are synthetic: power-law spectra, s_i = s_1 i^-0.7")


def once(
    task: Task, subject: Subject, method: str, rank: int, found: Calibration | None
) -> dict[str, Any]:
    """One block: first watched, which also loads kernels; then timed undisturbed and judged."""
    start = adapted(subject, method, rank, targets(1), fresh(found))
    with timed_phases(task.device) as phases, counted_synchronizations() as waits, start as model:
        inject = spent(model)["inject"]
    figures, judged = measured(task, subject, method, rank, 1, found, judge=True)
    return task.record.row(
        f"{method} r={rank}",
        **figures,
        **{f"{phase}_seconds": value for phase, value in phases.items()},
        inject_seconds=inject,
        waits=sum(waits.values()),
        waits_by_line=dict(waits.most_common(LINES)),
        **judged,
    )


def measured(
    task: Task,
    subject: Subject,
    method: str,
    rank: int,
    blocks: int,
    found: Calibration | None,
    judge: bool = False,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Seconds and peak memory of one call, also scaled to the whole model; then its quality."""
    given = fresh(found)
    watch = peak_watch(task.device)
    with ExitStack() as stack:
        start = adapted(subject, method, rank, targets(blocks), given)
        call, model = timed(lambda: stack.enter_context(start), task.device)
        peak = watch.rise() / 2**30
        taken = spent(model)
        judged = quality(task, subject, method, model, found) if judge else {}
    seconds = taken["allocation"] + taken["initialize"] + taken["inject"]
    figures = {
        "blocks": blocks,
        "seconds": seconds,
        "call_seconds": call,
        "model_seconds": subject.shape.blocks / blocks * seconds,
        "peak_gib": peak,
    }
    return figures, judged


def spent(model: LoraModel) -> dict[str, float]:
    """Seconds by step. `init_report()` has them too, but measures every layer first."""
    return model._report.seconds


@contextmanager
def adapted(
    subject: Subject, method: str, rank: int, names: list[str], found: Calibration | None
) -> Iterator[LoraModel]:
    """The model with the adapter, which is removed again whatever happens inside."""
    settings = SPELLED.get(method, method)
    config = LoraConfig(r=rank, target_modules=names, init_lora_weights=settings)
    model = get_peft_model(
        subject.model, config, calibration=found, keep_original=True, cache=False
    )
    try:
        yield model
    finally:
        model.unload()


def statistics(task: Task, subject: Subject, method: str, blocks: int) -> Calibration | None:
    """What the method reads, from random tokens; None for one that reads none."""
    spec, _ = resolve(SPELLED.get(method, method))
    if not spec.needs_data:
        return None
    method = SPELLED.get(method, method)
    config = LoraConfig(r=1, target_modules=targets(blocks), init_lora_weights=method)
    rows, length = (4, 32) if task.small else (4, 2048)
    batches = token_batches(subject.shape, 1, rows, length, task.device)
    return calibrate(subject.model, config, batches)


def fresh(found: Calibration | None) -> Calibration | None:
    """The same statistics without the decompositions that an earlier call left in them."""
    if found is None:
        return None
    copies: dict[int, InputStatistics] = {}
    requests = {}
    for request, layers in found.requests.items():
        requests[request] = {}
        for name, layer in layers.items():
            inputs = layer.inputs
            if isinstance(inputs, InputStatistics):
                key = id(inputs)
                if key not in copies:
                    copies[key] = InputStatistics(inputs.covariance, inputs.mean, inputs.tokens)
                inputs = copies[key]
            requests[request][name] = LayerStatistics(inputs, layer.gradient)
    return Calibration(requests, found.tokens, found.batches, dict(found.fingerprints))


def quality(
    task: Task, subject: Subject, method: str, model: LoraModel, found: Calibration | None
) -> dict[str, float]:
    """The sampled layer compared with the exact optimum, and its output at step 0."""
    layer = model.layers[subject.sampled]
    inputs = None if found is None else found.layers[subject.sampled].inputs
    figures = exactness.figures(method, layer, subject.exact, inputs)
    for name, value in figures.items():
        if not value <= exactness.LIMITS[name]:
            task.record.refute(
                f"{method} r={layer.rank}: {name} is {value:.1e}, must be at most "
                f"{exactness.LIMITS[name]:.0e}"
            )
    spec, _ = resolve(SPELLED.get(method, method))
    if spec.preserves_output and layer.base_state in ("kept", "in_forward"):
        x = torch.randn(64, layer.in_features, device=task.device).to(layer.base_layer.weight)
        with torch.no_grad():
            figures["step_0"] = relative(layer(x), layer.base_layer(x))
        epsilon = torch.finfo(x.dtype).eps
        ratio = max(1.0, float(exactness.product(layer).norm() / subject.exact.weight.norm()))
        if not figures["step_0"] <= epsilon * ratio:
            task.record.refute(
                f"{method} r={layer.rank}: step 0 differs by {figures['step_0']:.1e}"
            )
    if spec.base == "replace":
        (row,) = [row for row in model.init_report().layers if row.name == subject.sampled]
        figures["error"], plain = row.error, row.details.get("error_without_adapter")
        if plain is not None and not row.error < plain:
            task.record.refute(
                f"{method} r={layer.rank}: error {row.error:.3g}, without {plain:.3g}"
            )
    return figures
