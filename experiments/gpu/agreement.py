"""The same adapters as on the CPU, for a model on either device.

Every method runs twice on the device: for a model on the CPU, and for a model on the device. The
reference is the adapter that the CPU computes. 16-bit models get statistics from the CPU in each
case, because two devices round 16-bit activations differently.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from lora_init import Calibration, Initializer, LoraConfig, LoraModel, calibrate, get_peft_model
from lora_init import list_initializers as initializers
from lora_init.weights.kinds import oriented_weight

from . import promises
from .lifecycle import Life, exact_convolutions, lived, relative, twin
from .specimens import KINDS, PACKED, Specimen, data_of
from .task import Task

RANK = 8
PROMISE = 1e-5
"""The most that s B A may differ between two devices, as a share of ‖W‖."""
FACTOR_PROMISE = 1e-4
"""The most that factors with a zero product may differ, as a share of their norm."""
OBJECTIVE_PROMISE = 1e-3
"""The most that the errors of quantizing methods may differ, as a share of ‖W‖. A different
rounding changes the start of the next iteration, so that s B A differs at the same error."""
SAME_RANKS = {"eva": {"rho": 1.0}, "gora": {"smallest": 1.0, "largest": 1.0}}
"""Options under which a method keeps the given ranks."""
KRYLOV = ("pissa", "corda", "lora_ga", "milora", "loftq")
LIMITS = {"gap": PROMISE, "objective": OBJECTIVE_PROMISE, "difference": float("inf")}
"""The most that a figure may be, by the first part of its name; 1 for all others."""
FEW = ("kaiming", "pissa", "eva", "loftq")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def run(task: Task) -> None:
    width, few = (32, FEW) if task.small else (96, None)
    for dtype in (FLOAT32, BFLOAT16):
        every_method(task, Specimen("Linear", dtype, width), width, few)
    if not task.small:
        every_method(task, Specimen("Linear", FLOAT32, 400), width, placements=("device",))
    for name, check in promises.CHECKS.items():
        if task.affords(name, 2):
            with task.guarded(name, refutes=True):
                promises.record(task, name, check)
    task.record.note("float32 convolutions are compared with TF32 switched off")
    with exact_convolutions():
        for kind in KINDS[1:]:
            for dtype in (BFLOAT16,) if task.small else (FLOAT32, BFLOAT16):
                every_method(task, Specimen(kind, dtype, width), width, few, ("device",))
    if task.small:
        task.record.note("quantized bases: skipped in the small form")
    elif importlib.util.find_spec("bitsandbytes") is None:
        task.record.note("quantized bases: skipped, bitsandbytes is not installed")
    else:
        for kind in PACKED:
            every_method(task, Specimen(kind, torch.float16, 64), 64, few, ("device",))
    if not task.small:
        every_method(task, Specimen("Linear", FLOAT32, 1088), width, KRYLOV, ("device",))


def every_method(
    task: Task,
    specimen: Specimen,
    width: int,
    names: tuple[str, ...] | None = None,
    placements: tuple[str, ...] = ("cpu", "device"),
) -> None:
    """Record the gaps of each method, and the errors of its life over their tolerances.

    Args:
        width: specimens of this width also go through their life.
        placements: where the model is; "cpu" initializes it on the device.
    """
    specs = [
        spec
        for spec in initializers()
        if specimen.kind in spec.module_types and (names is None or spec.name in names)
    ]
    for number, spec in enumerate(specs):
        name = f"{spec.name}, {specimen}"
        if not task.affords(name, 15 if specimen.width > 1000 else 3):
            return
        use_dora = number % 2 == 1
        with task.guarded(name, refutes=True):
            figures = compared(
                task, spec, specimen, placements, use_dora and specimen.kind != "Linear"
            )
            if specimen.width == width:
                figures |= vars(life(task, spec, specimen, use_dora))
            judged(task, name, figures)


def compared(
    task: Task, spec: Initializer, specimen: Specimen, placements: tuple[str, ...], use_dora: bool
) -> dict[str, float]:
    """The gap between the device's adapter and the CPU's, for each placement of the model."""
    found = None
    if spec.needs_data and specimen.dtype != FLOAT32:
        base = specimen.build()
        found = calibrate(base, config(spec, base), data_of(spec, specimen.calibration("cpu")))
    reference = adapted(spec, specimen, "cpu", None, found, use_dora)
    figures = {}
    for placement in placements:
        place = task.device if placement == "device" else torch.device("cpu")
        model = adapted(spec, specimen, place, task.device, found, use_dora)
        if spec.base == "replace":
            figures[f"difference_{placement}"] = gap(model, reference)
            figures[f"objective_{placement}"] = objective_gap(model, reference)
        else:
            figures[f"gap_{placement}"] = gap(model, reference)
    return figures


def adapted(
    spec: Initializer,
    specimen: Specimen,
    place: torch.device | str,
    device: torch.device | None,
    found: Calibration | None = None,
    use_dora: bool = False,
    base: nn.Module | None = None,
) -> LoraModel:
    """The specimen on `place` with the method's adapter, computed on `device`."""
    base = moved(specimen.build(), place) if base is None else base
    return get_peft_model(
        base,
        config(spec, base, use_dora),
        calibration=data_of(spec, specimen.calibration(place)) if found is None else found,
        device=device,
        seed=3,
        original_weights=specimen.originals() if spec.base == "replace" else None,
        keep_original=True,
        cache=False,
    )


def config(spec: Initializer, base: nn.Module, use_dora: bool = False) -> LoraConfig:
    names = [name for name, module in base.named_modules() if name.startswith("layers.")]
    method = {"name": spec.name, **SAME_RANKS.get(spec.name, {})}
    rank = min(RANK, *(min(oriented_weight(base.get_submodule(name)).shape) for name in names))
    return LoraConfig(r=rank, target_modules=names, init_lora_weights=method, use_dora=use_dora)


def moved(model: nn.Module, place: torch.device | str) -> nn.Module:
    """The model on a device, with the 8-bit scales that bitsandbytes does not move."""
    model.to(place)
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and module.weight.CB is not None:
            weight = module.weight
            weight.CB, weight.SCB = weight.data, weight.SCB.to(place)
    return model


def gap(model: LoraModel, reference: LoraModel) -> float:
    """The largest ‖difference of s B A‖ / ‖W‖.

    Where the product is zero, the factors are compared instead, on the scale of `FACTOR_PROMISE`.
    """
    worst = 0.0
    for name, layer in model.layers.items():
        other = reference.layers[name]
        if layer.rank != other.rank:
            return float("inf")
        expected, product = other.initial_product(), layer.initial_product().cpu()
        weight = oriented_weight(other.base_layer).float()
        worst = max(worst, relative(product, expected, weight))
        if not expected.any():
            share = PROMISE / FACTOR_PROMISE
            for a, b in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
                if b.any():
                    worst = max(worst, share * relative(a.detach().cpu(), b.detach()))
    return worst


def objective_gap(model: LoraModel, reference: LoraModel) -> float:
    """The largest difference of ‖W - Q - s B A‖ / ‖W‖ between two quantized starts."""
    ours, theirs = model.init_report().layers, reference.init_report().layers
    return max(abs(one.error - other.error) for one, other in zip(ours, theirs, strict=True))


def life(task: Task, spec: Initializer, specimen: Specimen, use_dora: bool) -> Life:
    base = moved(specimen.build(), task.device)
    reference = twin(base)
    model = adapted(spec, specimen, task.device, None, use_dora=use_dora, base=base)
    x = specimen.inputs().to(task.device)
    return lived(model, reference, x, keeps_output=spec.preserves_output)


def judged(task: Task, name: str, figures: dict[str, Any]) -> None:
    """Record the row, and which of its figures are wrong."""
    task.record.row(name, **figures)
    for key, value in figures.items():
        limit = LIMITS.get(key.partition("_")[0], 1.0)
        if value is not None and not value <= limit:
            task.record.refute(f"{name}: {key} is {value:.1e}, must be at most {limit:.0e}")
