"""The start of a run: the adapter, and what is measured around its initialization."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from lora_init import CalibrationRequest, LoraConfig, LoraModel, get_peft_model
from lora_init.weights.source import BaseWeights

from ..config.run_config import RunConfig
from ..console import say
from ..data import Example, Splits, calibration_texts
from ..errors import ConfigurationError
from ..measures import Originals, measure_originals
from ..measures.fidelity import first_step_error
from ..measures.probe import PeakMemory, output_gap, probe
from ..models import LoadedModel, load_model
from ..tasks import Task, draw
from .budget import check_parameters

PROBED_EXAMPLES = 16


def initialize(
    run: RunConfig, data: Splits, task: Task, loaded: LoadedModel, device: torch.device
) -> tuple[LoraModel, dict[str, Any], Originals]:
    """Add the adapter; returns the model, the content of `init.json`, and facts on the base."""
    model = on_device(loaded, device)
    batch = task.collate(data.train[:PROBED_EXAMPLES])
    mask = task.probed(batch)
    before = probe(model, batch, mask)
    with naming_the_method(run):
        config = LoraConfig(
            **asdict(run.lora), task_type=data.task_type, init_lora_weights=asdict(run.init)
        )
        method = config.initializer()[0]
        plan = get_peft_model(model, config, dry_run=True)
        check_parameters(plan, run.budget, rank=run.lora.r, allocated=False)
        stored = loaded.original_weights if method.base == "replace" else None
        originals = measure_originals(plan, BaseWeights(model, stored), run.measures)
    with PeakMemory() as memory, naming_the_method(run):
        # Only for methods that calibrate. A list, so that the cache can keep its statistics.
        batches = None
        if method.needs_data:
            request = method.request(config.initializer()[1])
            batches = calibration_data(run, data, task, device, request)
        memory_limit = run.runtime.calibration_gib
        adapted = get_peft_model(
            model,
            config,
            calibration=batches,
            seed=run.seeds.init,
            original_weights=stored,
            cache=run.runtime.cache,
            calibration_memory=None if memory_limit is None else int(memory_limit * 2**30),
        )
        check_parameters(adapted.plan, run.budget, rank=run.lora.r, allocated=True)
    trainable, total = adapted.get_nb_trainable_parameters()
    report = {
        **adapted.init_report().to_dict(),
        "peak_memory_bytes": memory.bytes,
        "peak_memory_kind": memory.kind,
        "held_memory_bytes": memory.held,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "output_gap": output_gap(before, probe(adapted, batch, mask)),
        "first_step_error": fidelity(run, data, task, adapted, list(originals.norms)),
    }
    return adapted, report, originals


def fidelity(
    run: RunConfig, data: Splits, task: Task, model: LoraModel, targets: Sequence[str]
) -> float | None:
    """The relative error of the first step on a few examples; None, and a line, if it fails."""
    if run.measures.first_step_layers == 0:
        return None
    size = run.runtime.micro_batch_size or PROBED_EXAMPLES
    examples = data.train[:PROBED_EXAMPLES]
    starts = range(0, len(examples), size)
    batches = [task.collate(examples[start : start + size]) for start in starts]
    try:
        return first_step_error(model, targets, batches, run.measures.first_step_layers)
    except ValueError as error:  # a measure never ends a run
        say(f"  the first step is not compared with the gradient: {error}")
        return None


Batch = dict[str, torch.Tensor]


def calibration_data(
    run: RunConfig, data: Splits, task: Task, device: torch.device, request: CalibrationRequest
) -> list[Batch] | dict[str, list[Batch]]:
    """The calibration batches of a run: one list, or one per set that the method compares.

    The set "learn" holds training examples, and "keep" the texts of `calibration.path`.

    Raises:
        ConfigurationError: the method compares sets, and there are no texts to keep.
    """
    texts = run.calibration.path
    if not request.sets:
        return list(calibration_batches(run, data, task, device))
    if texts is None or set(request.sets) != {"learn", "keep"}:
        raise ConfigurationError(
            f"calibration.path={texts} is not supported with init={run.init.name}, which reads the "
            f"sets {', '.join(request.sets)}: must be a file of JSON lines with texts to keep"
        )
    return {name: list(calibration_batches(run, data, task, device, name)) for name in request.sets}


def calibration_batches(
    run: RunConfig, data: Splits, task: Task, device: torch.device, source: str | None = None
) -> Iterator[Batch]:
    """Examples that `seeds.calibration` draws, one batch at a time.

    Args:
        source: "learn" for training examples, "keep" for the texts of `calibration.path`; None for
            the texts if there are any.
    """
    settings = run.calibration
    examples: Sequence[Example] = data.train
    if source == "keep" or (source is None and settings.path is not None):
        examples = calibration_texts.texts_of(settings, data.task_type)
    chosen = draw(len(examples), settings.samples, run.seeds.calibration)
    for start in range(0, len(chosen), settings.batch_size):
        some = [examples[index] for index in chosen[start : start + settings.batch_size]]
        yield {key: value.to(device) for key, value in task.collate(some).items()}


@contextmanager
def naming_the_method(run: RunConfig) -> Iterator[None]:
    """Turn the library's refusals into configuration errors that name the method."""
    try:
        yield
    except ConfigurationError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).removeprefix(f"{run.init.name}: ")  # several refusals start with it
        raise ConfigurationError(f"init={run.init.name}: {reason}") from error


def on_device(loaded: LoadedModel, device: torch.device) -> torch.nn.Module:
    """The model on the device; a quantized model must stay where it was loaded."""
    return loaded.model if loaded.original_weights else loaded.model.to(device)


def load_base(
    run: RunConfig, data: Splits, device: torch.device
) -> tuple[torch.nn.Module, str | None]:
    """The original base, and where the unquantized weights of a quantized one are."""
    loaded = load_model(
        run.model, task_type=data.task_type, labels=data.labels, head_seed=run.seeds.head
    )
    return on_device(loaded, device), loaded.original_weights
