"""From settings to rows: every method's first step in every layer, on its own data and on others'.

One row a model, layer, method and batch. Gradients are those of `lora_init.gradients`; those of one
batch are held at a time, and whatever else is m × n is one layer's. What a gradient alone decides
(the bounds, its signs) is computed once for all methods that share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from experiments.console import say
from experiments.papers.first_step.alignment import (
    adam_step,
    rank_bounds,
    relative_error,
    sgd_step,
)
from experiments.papers.first_step.settings import FirstStepSettings
from experiments.papers.starts import (
    UNCENTRED,
    Gradients,
    Start,
    calibration_for,
    moves_function,
    startable,
    started,
)
from experiments.papers.subject import Layer, Subject, short_name
from experiments.papers.tasks import Batches, load_with_task, measured_layers, task_batches
from lora_init.gradients import collect_gradients
from lora_init.progress import tracked
from lora_init.registry import Initializer, resolve

CALIBRATION, FRESH, TOGETHER = "calibration", "fresh", "fresh together"
OWN_START = "lora_one’s start itself"
SUBJECT = "lora_ga"


@dataclass(frozen=True)
class Taken:
    """Where gradients come from.

    Attributes:
        data: "calibration" for what the methods know, "fresh" for a batch that they do not, "fresh
            together" for the mean over all of these.
        number: of the fresh batch.
    """

    data: str
    number: int
    batches: Batches


@dataclass(frozen=True)
class Kept:
    """A method's factors, after its model was unloaded."""

    initializer: Initializer
    lora_A: Mapping[str, Tensor]
    lora_B: Mapping[str, Tensor]
    zero_B: bool

    @classmethod
    def of(cls, start: Start) -> Kept:
        zero_B = not any(bool(factor.any()) for factor in start.lora_B.values())
        return cls(start.initializer, dict(start.lora_A), dict(start.lora_B), zero_B)

    def factors(self, layer: Layer) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        return self.lora_A[layer.name], self.lora_B[layer.name]


def measure(model: str, settings: FirstStepSettings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of all methods; and of LoRA-GA by the number of sequences it is calibrated on."""
    data = settings.data(model)
    subject = load_with_task(model, settings.device)
    layers = measured_layers(subject, data.every)
    methods = chosen_methods(settings, data.moved)
    shape = {"size": data.batch_size, "length": data.length}
    own = task_batches(subject, "train", data.calibration, **shape)
    fresh = [
        Taken(FRESH, number, batches)
        for number, batches in enumerate(fresh_batches(subject, settings))
    ]
    say(f"  {model}: {len(methods)} methods on {len(layers)} layers, r = {settings.rank}")
    kept, rows = start_all(subject, layers, methods, [Taken(CALIBRATION, 0, own), *fresh], settings)
    sized, size_rows = {data.calibration: kept[SUBJECT]}, []
    for size in tracked(sorted(set(data.sizes) - set(sized)), "calibrating on more and less"):
        more = Taken(CALIBRATION, 0, task_batches(subject, "train", size, **shape))
        sized[size], found = start_on(subject, layers, more, settings)
        size_rows += found
    total: dict[str, Tensor] = {}
    for taken in tracked([Taken(CALIBRATION, 0, own), *fresh], "comparing"):
        gradients = collect_gradients(
            subject.model, [layer.name for layer in layers], taken.batches
        )
        if taken.data == FRESH:
            total = {name: g + total.get(name, 0) for name, g in gradients.items()}
        still = {name: found for name, found in kept.items() if not moved(found)}
        rows += compared(layers, taken, gradients, still, bounded=settings.rank)
        if "lora_one" in kept:
            rows += own_start(layers, taken, gradients, kept["lora_one"])
        known = sized if taken.data == FRESH else {data.calibration: kept[SUBJECT]}
        size_rows += by_size(layers, taken, gradients, known)
    size_rows += by_size(layers, Taken(TOGETHER, 0, []), total, sized)
    name = short_name(model)
    return pd.DataFrame(rows).assign(model=name), pd.DataFrame(size_rows).assign(model=name)


def chosen_methods(settings: FirstStepSettings, with_moved: bool) -> list[str]:
    """Those asked for, without the ones whose gradients would take passes of their own."""
    methods = settings.methods or [name for name in startable() if name != UNCENTRED]
    return [name for name in methods if with_moved or not moves_function(resolve(name)[0])]


def fresh_batches(subject: Subject, settings: FirstStepSettings) -> list[Batches]:
    """As many sequences as the calibration has, again and again, of the validation films."""
    data = settings.data(subject.name)
    size = min(data.batch_size, data.calibration)
    count = -(-data.calibration // size)
    flat = task_batches(
        subject, "validation", data.fresh * count * size, size=size, length=data.length
    )
    return [flat[first : first + count] for first in range(0, len(flat), count)]


def start_all(
    subject: Subject,
    layers: Sequence[Layer],
    methods: Sequence[str],
    taken: Sequence[Taken],
    settings: FirstStepSettings,
) -> tuple[dict[str, Kept], list[dict]]:
    """All methods' factors, and the rows of those that have gradients of their own."""
    names = [layer.name for layer in layers]
    calibration = calibration_for(subject, methods, names, settings.rank, taken[0].batches)
    kept, rows = {}, []
    for method in tracked(methods, "starting"):
        with started(
            subject, method, names, settings.rank, calibration, seed=settings.seed
        ) as start:
            kept[method] = Kept.of(start)
            for one in taken if moved(kept[method]) else ():
                found = start.gradients(one.batches)
                rows += compared(layers, one, found, {method: kept[method]})
    return kept, rows


def start_on(
    subject: Subject, layers: Sequence[Layer], known: Taken, settings: FirstStepSettings
) -> tuple[Kept, list[dict]]:
    """LoRA-GA from some sequences, and its rows on these."""
    names = [layer.name for layer in layers]
    calibration = calibration_for(subject, [SUBJECT], names, settings.rank, known.batches)
    gradients = {name: calibration.layers[name].gradient for name in names}
    with started(subject, SUBJECT, names, settings.rank, calibration, seed=settings.seed) as start:
        kept = Kept.of(start)
    size = sum(len(batch["input_ids"]) for batch in known.batches)
    return kept, by_size(layers, known, gradients, {size: kept})


def by_size(
    layers: Sequence[Layer], taken: Taken, gradients: Gradients, sized: Mapping[int, Kept]
) -> list[dict]:
    """Rows of LoRA-GA from each number of sequences: its SGD step alone."""
    rows = []
    for layer in layers:
        gradient = gradients[layer.name].double()
        for size, kept in sized.items():
            step = sgd_step(gradient, *kept.factors(layer), kept.initializer.frozen)
            error = relative_error(step, gradient)
            rows.append({**described(layer, taken, SUBJECT), "size": size, "error": error})
    return rows


def moved(kept: Kept) -> bool:
    return moves_function(kept.initializer)


def compared(
    layers: Sequence[Layer],
    taken: Taken,
    gradients: Gradients,
    kept: Mapping[str, Kept],
    bounded: int | None = None,
) -> list[dict]:
    """Rows of methods that share these gradients.

    Args:
        bounded: also what steps of this rank and of twice that could reach. Asked of the pretrained
            function's gradients, as the claim is, and not of each moved method's own.
    """
    rows = []
    for layer in layers:
        gradient = gradients[layer.name].double()
        signs = gradient.sign()
        bounds = {}
        if bounded is not None:
            found = rank_bounds(gradient, [bounded, 2 * bounded])
            bounds = dict(zip(("bound_r", "bound"), found, strict=True))
        for method, one in kept.items():
            factors, frozen = one.factors(layer), one.initializer.frozen
            adam = adam_step(gradient, *factors, frozen)
            rows.append(
                {
                    **described(layer, taken, method),
                    "zero_B": one.zero_B,
                    "moved": moved(one),
                    "error": relative_error(sgd_step(gradient, *factors, frozen), gradient),
                    "adam": relative_error(adam, gradient),
                    "adam_signs": relative_error(adam, signs),
                    **bounds,
                }
            )
    return rows


def own_start(
    layers: Sequence[Layer], taken: Taken, gradients: Gradients, kept: Kept
) -> list[dict]:
    """How LoRA-One's start itself follows the gradient of the model before it: s B0 A0 and -G."""
    rows = []
    for layer in layers:
        lora_A, lora_B = kept.factors(layer)
        error = relative_error((lora_B, -lora_A), gradients[layer.name])
        row = described(layer, taken, OWN_START)
        rows.append({**row, "zero_B": False, "moved": True, "error": error})
    return rows


def described(layer: Layer, taken: Taken, method: str) -> dict:
    return {
        "layer": layer.name,
        "block": layer.block,
        "kind": layer.kind,
        "method": method,
        "data": taken.data,
        "batch": taken.number,
    }
