"""The rows of LoRA-GA's first step: every method's step in every layer, on known and on new data.

`experiments.measures.fidelity` has the step U of SGD and its relative error, the
distance from the gradient G at the best length. U has rank 2r at most, so no start is closer than
the best approximation of that rank (Eckart and Young),

    sqrt(sum over i > 2r of σ_i²) / ‖G‖,    σ the singular values of G.

The gradients of one batch are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.calibration.gradients import collect_gradients
from lora_init.progress import tracked
from lora_init.registry import Initializer, resolve

from ..console import say
from ..measures.fidelity import Product, first_step, relative_error
from .reproduction import Measurement, Options, require, require_at_least
from .starts import (
    UNCENTRED,
    Gradients,
    Start,
    calibration_for,
    check_methods,
    moves_function,
    startable,
    started,
)
from .subject import DESCRIBED, Layer, Subject, short_name
from .tasks import (
    Batches,
    TaskData,
    described_data,
    load_with_task,
    measured_layers,
    task_batches,
)

CALIBRATION, FRESH, TOGETHER = "calibration", "fresh", "fresh together"
SUBJECT = "lora_ga"


@dataclass
class Data(TaskData):
    """The data of one model.

    Attributes:
        calibration: sequences for the methods that use data.
        fresh: batches of as many other sequences, of other films.
        sizes: LoRA-GA is also calibrated on these numbers of sequences.
    """

    calibration: int
    fresh: int
    sizes: list[int]

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "length", "calibration", "fresh", "sizes", "every")
        whole = self.calibration < self.batch_size or self.calibration % self.batch_size == 0
        wanted = f"less than one batch, or a multiple of batch_size={self.batch_size}"
        require(self, "calibration", whole, wanted)


@dataclass
class FirstStepOptions(Options):
    """What is measured.

    Attributes:
        models: as `load_subject` takes them. minilm is measured as a classifier of film reviews
            with the data of `encoder`, every other one as a language model with those of
            `language`.
        rank: of all methods.
        methods: registered names; null for all that start a linear layer.
    """

    models: list[str] = field(default_factory=lambda: ["minilm", "smollm2"])
    rank: int = 8
    methods: list[str] | None = None
    encoder: Data = field(default_factory=lambda: Data(32, 48, 1, True, 32, 3, [8, 128]))
    language: Data = field(default_factory=lambda: Data(4, 64, 5, False, 8, 2, [2, 16]))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "models", bool(self.models), "one or more models, such as minilm")
        require_at_least(self, 1, "rank")
        if self.methods is not None:
            check_methods(self.methods)
            compared = SUBJECT in self.methods and len(self.methods) > 1
            require(self, "methods", compared, f"two or more methods with {SUBJECT} among them")

    def data(self, model: str) -> Data:
        return self.encoder if model == "minilm" else self.language


def rank_bounds(gradient: Float[Tensor, "out in"], ranks: Sequence[int]) -> list[float]:
    """The relative error of the best approximation of each rank."""
    wide = gradient.double() if gradient.shape[0] <= gradient.shape[1] else gradient.double().T
    energies = torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0)  # ascending
    total = energies.sum()
    tails = [energies[: max(0, len(energies) - rank)].sum() for rank in ranks]
    return [float((tail / total).sqrt()) for tail in tails]


@dataclass(frozen=True)
class Source:
    """The batches of a gradient.

    Attributes:
        data: "calibration" for the methods' own data, "fresh" for a new batch, "fresh together"
            for the mean over all new ones.
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

    def step(self, layer: Layer, gradient: Float[Tensor, "out in"]) -> Product:
        factors = self.lora_A[layer.name], self.lora_B[layer.name]
        return first_step("sgd", gradient, *factors, self.initializer.frozen)

    @property
    def moved(self) -> bool:
        return moves_function(self.initializer)


def measure(options: FirstStepOptions) -> Measurement:
    """Measure every model."""
    found = [measure_model(model, options) for model in options.models]
    rows, sizes = (pd.concat(frames, ignore_index=True) for frames in zip(*found, strict=True))
    layers = rows.groupby("model")["layer"].nunique()
    facts = {
        short_name(model): f"{DESCRIBED.get(model, model)}; {described_data(model)}; "
        f"{layers[short_name(model)]} layers"
        for model in options.models
    }
    facts["methods"] = (
        "s = 1, the library’s options (lora_one: gamma = 8 √r, its authors’ step at this s)"
    )
    facts["the paper’s"] = "a theorem on one gradient; experiments on T5-base and Llama-2-7B"
    return Measurement(options, {"steps": rows, "sizes": sizes}, facts)


def measure_model(model: str, options: FirstStepOptions) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of all methods; and rows of LoRA-GA by its number of calibration sequences."""
    data = options.data(model)
    subject = load_with_task(model, options.device)
    layers = measured_layers(subject, data.every)
    names = [layer.name for layer in layers]
    methods = chosen_methods(options, data.moved)
    shape = {"size": data.batch_size, "length": data.length}
    own = Source(CALIBRATION, 0, task_batches(subject, "train", data.calibration, **shape))
    fresh = [Source(FRESH, n, batches) for n, batches in enumerate(fresh_batches(subject, data))]
    say(f"  {model}: {len(methods)} methods on {len(layers)} layers, r = {options.rank}")
    kept, rows = start_all(subject, layers, methods, [own, *fresh], options)
    sized, size_rows = {data.calibration: kept[SUBJECT]}, []
    for size in tracked(sorted(set(data.sizes) - set(sized)), "calibrating on more and less"):
        known = Source(CALIBRATION, 0, task_batches(subject, "train", size, **shape))
        calibration = calibration_for(subject, [SUBJECT], names, options.rank, known.batches)
        gradients = {name: calibration.layers[name].gradient for name in names}
        with started(
            subject, SUBJECT, names, options.rank, calibration, seed=options.seed
        ) as start:
            sized[size] = Kept.of(start)
        size_rows += by_size(layers, known, gradients, {size: sized[size]})
    total: dict[str, Tensor] = {}
    for source in tracked([own, *fresh], "comparing"):
        gradients = collect_gradients(subject.model, names, source.batches)
        if source.data == FRESH:
            total = {name: g + total.get(name, 0) for name, g in gradients.items()}
        still = {name: found for name, found in kept.items() if not found.moved}
        rows += compare(layers, source, gradients, still, bounded=options.rank)
        known = sized if source.data == FRESH else {data.calibration: kept[SUBJECT]}
        size_rows += by_size(layers, source, gradients, known)
    size_rows += by_size(layers, Source(TOGETHER, 0, []), total, sized)
    name = subject.short
    return pd.DataFrame(rows).assign(model=name), pd.DataFrame(size_rows).assign(model=name)


def chosen_methods(options: FirstStepOptions, with_moved: bool) -> list[str]:
    """The methods to measure; those that move the function only on request."""
    methods = options.methods or [name for name in startable() if name != UNCENTRED]
    return [name for name in methods if with_moved or not moves_function(resolve(name)[0])]


def fresh_batches(subject: Subject, data: Data) -> list[Batches]:
    """Sets of as many sequences as the calibration has, of the validation films."""
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
    sources: Sequence[Source],
    options: FirstStepOptions,
) -> tuple[dict[str, Kept], list[dict]]:
    """All methods' factors, and the rows of those that move the function, on their gradients."""
    names = [layer.name for layer in layers]
    calibration = calibration_for(subject, methods, names, options.rank, sources[0].batches)
    kept, rows = {}, []
    for method in tracked(methods, "starting"):
        with started(subject, method, names, options.rank, calibration, seed=options.seed) as start:
            kept[method] = Kept.of(start)
            for source in sources if kept[method].moved else ():
                gradients = start.gradients(source.batches)
                rows += compare(layers, source, gradients, {method: kept[method]})
    return kept, rows


def compare(
    layers: Sequence[Layer],
    source: Source,
    gradients: Gradients,
    kept: Mapping[str, Kept],
    bounded: int | None = None,
) -> list[dict]:
    """Rows of methods that share these gradients.

    Args:
        bounded: a rank; adds the bounds of this rank and of twice that. None for the gradients of
            a method that moves the function, to which the theorem does not apply.
    """
    rows = []
    for layer in layers:
        gradient = gradients[layer.name].double()
        bounds = {}
        if bounded is not None:
            found = rank_bounds(gradient, [bounded, 2 * bounded])
            bounds = dict(zip(("bound_r", "bound"), found, strict=True))
        for method, one in kept.items():
            rows.append(
                {
                    **describe_row(layer, source, method),
                    "zero_B": one.zero_B,
                    "moved": one.moved,
                    "error": relative_error(one.step(layer, gradient), gradient),
                    **bounds,
                }
            )
    return rows


def by_size(
    layers: Sequence[Layer], source: Source, gradients: Gradients, sized: Mapping[int, Kept]
) -> list[dict]:
    """Rows of LoRA-GA's step of SGD by the number of calibration sequences."""
    rows = []
    for layer in layers:
        gradient = gradients[layer.name].double()
        for size, kept in sized.items():
            error = relative_error(kept.step(layer, gradient), gradient)
            rows.append({**describe_row(layer, source, SUBJECT), "size": size, "error": error})
    return rows


def describe_row(layer: Layer, source: Source, method: str) -> dict:
    """The columns that identify a row."""
    return {
        "layer": layer.name,
        "block": layer.block,
        "kind": layer.kind,
        "method": method,
        "data": source.data,
        "batch": source.number,
    }
