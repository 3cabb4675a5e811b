"""`lora-init plan`: what a start would do to a model, without loading unquantized weights."""

from __future__ import annotations

import time
from argparse import Namespace
from typing import Any

import torch

from lora_init import Plan, get_peft_model, init_factors
from lora_init.cli.adapter_arguments import adapter_config
from lora_init.cli.checkpoints import checkpoint_folder, full_name, is_quantized, loaded, skeleton
from lora_init.cli.output import emit
from lora_init.plan.left_out import described
from lora_init.plan.plan import Target
from lora_init.registry import Initializer, Options

SAMPLES = (192, 384)
"""Sizes of the random matrices that are timed: the shorter side of a layer is reduced to them."""


def plan_adapter(arguments: Namespace) -> None:
    """Print the targets, ranks, parameters, memory and time of a start, and what it leaves out."""
    folder = checkpoint_folder(arguments.model)
    model = loaded(folder, "cpu", None) if is_quantized(folder) else skeleton(folder)
    config = adapter_config(arguments, model, full_name(arguments.model))
    plan = get_peft_model(model, config, dry_run=True)
    assert isinstance(plan, Plan)
    seconds = None if arguments.no_time else estimated_seconds(plan)
    text = str(plan)
    if seconds is not None:
        text += (
            f"\ntime of the start: about {_duration(seconds)} on this machine's CPU, extrapolated "
            "from two small random matrices per shape; passes over data are not included"
        )
    emit(arguments, _data(plan, seconds), text)


def estimated_seconds(plan: Plan) -> float:
    """An estimate of the initializer's time for all targets, without the passes over data.

    For each shape of a target, the method runs on two random matrices of the same proportions whose
    shorter side has `SAMPLES` entries. A power law through both times gives the time at full size.
    Its exponent is between 1.5 and 3: reading a matrix has exponent 2, decomposing it 3.
    """
    seconds: dict[tuple[Any, ...], float] = {}
    total = 0.0
    for target in plan.targets:
        key = (target.shape, target.rank)
        if key not in seconds:
            seconds[key] = _seconds(plan, target)
        total += seconds[key]
    return total


def _seconds(plan: Plan, target: Target) -> float:
    side = min(target.shape)
    if side <= SAMPLES[-1]:
        return _timed(plan, target, target.shape)
    times = [
        _timed(plan, target, tuple(max(1, round(n * size / side)) for n in target.shape))
        for size in SAMPLES
    ]
    exponent = torch.tensor(times[1] / times[0]).log2().clamp(1.5, 3.0)
    return times[1] * float((side / SAMPLES[-1]) ** exponent)


def _timed(plan: Plan, target: Target, shape: tuple[int, ...]) -> float:
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    weight = torch.randn(rows, columns, generator=generator)
    rank = min(target.rank, max(1, min(shape) // 2))
    data = random_data(plan.initializer, plan.options, rows, columns, generator)
    best = float("inf")
    for _ in range(2):  # the first call also loads code
        start = time.perf_counter()
        init_factors(weight, plan.options, r=rank, **data)
        best = min(best, time.perf_counter() - start)
    return best


def random_data(
    spec: Initializer, options: Options, rows: int, columns: int, generator: torch.Generator
) -> dict[str, Any]:
    """Random data of the kinds that a method reads, as arguments of `init_factors`."""
    request = spec.request(options)
    sizes = {
        "gradient": (rows, columns),
        "target_weight": (rows, columns),
        "output_moments": (rows,),
    }
    data: dict[str, Any] = {
        name: torch.randn(size, generator=generator)
        for name, size in sizes.items()
        if name in spec.reads
    }
    if "output_moments" in data:
        data["output_moments"] = data["output_moments"].square()
    if "inputs" in spec.reads:
        names = (request.sets if request else ()) or (None,)
        sets = {name: torch.randn(2 * columns, columns, generator=generator) for name in names}
        data["inputs"] = sets.get(None, sets)
    return data


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} minutes" if seconds < 5400 else f"{seconds / 3600:.2g} hours"


def _data(plan: Plan, seconds: float | None) -> dict[str, Any]:
    spec = plan.initializer
    return {
        "method": spec.name,
        "base": spec.base,
        "preserves_output": spec.preserves_output,
        "reads": sorted(spec.reads),
        "parameters": plan.parameters,
        "factor_bytes": plan.factor_bytes,
        "statistics_bytes": plan.statistics_bytes,
        "workspace_bytes": plan.workspace_bytes,
        "seconds": seconds,
        "targets": [
            {
                "name": target.name,
                "module_type": target.module_type,
                "shape": list(target.shape),
                "dtype": target.dtype,
                "rank": target.rank,
                "alpha": target.alpha,
                "scaling": target.scaling,
            }
            for target in plan.targets
        ],
        "modules_to_save": list(plan.modules_to_save),
        "left_out": list(described(plan.left_out)),
    }
