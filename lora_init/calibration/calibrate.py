"""Collect the statistics that a plan needs, from batches or from an existing `Calibration`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.cache import Cache
from lora_init.calibration.batches import BATCHES
from lora_init.calibration.cached import remembered
from lora_init.calibration.collect import collect_all, collect_in_passes, collect_sketches
from lora_init.calibration.few_tokens import with_layer_statistics
from lora_init.calibration.places import placed
from lora_init.calibration.result import Calibration, merged
from lora_init.calibration.sets import check_calibration, check_sets, over_sets
from lora_init.config.lora_config import LoraConfig
from lora_init.layer import LayerStatistics
from lora_init.moments import InputSets, InputStatistics
from lora_init.plan.make import check_model, checked_config, make_plan
from lora_init.plan.new_weights import with_new_heads
from lora_init.plan.plan import Plan
from lora_init.registry import CalibrationRequest
from lora_init.weights.fingerprint import fingerprint, has_fingerprint


def calibrate(
    model: nn.Module,
    configs: LoraConfig | Sequence[LoraConfig],
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    *,
    device: str | torch.device | None = None,
) -> Calibration:
    """Run calibration once for several configurations of `get_peft_model`.

    The result fits any rank. One pass collects the moments of all inputs. Methods that need
    gradients add a second pass::

        found = calibrate(model, [eva, corda], batches)
        model = get_peft_model(model, eva, calibration=found)

    Args:
        model: the base model. It is not changed. Under `torch.distributed` every rank passes
            different batches and gets the statistics of all of them.
        configs: the configurations whose target layers are observed. Their ranks do not matter.
        batches: as `calibration` of `get_peft_model`. Must be a list or a loader if both passes are
            needed; a dict of sets for methods that compare several.
        device: where the sums are stored. None stores them on the device of the activations.

    Returns:
        A `Calibration`, which has a `save` method.

    Raises:
        ValueError: no configuration needs data, or the batches are invalid.
    """
    check_model(model)
    several = isinstance(configs, Iterable) and not isinstance(configs, str)
    given: Any = configs if several else [configs]
    configs = [with_new_heads(model, checked_config("configs", each)) for each in given]
    if batches is None:
        raise TypeError(f"batches=None is not supported: {BATCHES}")
    check_calibration(batches, "batches")
    plans = [
        plan for config in configs if (plan := make_plan(model, config)).calibration is not None
    ]
    if not plans:
        methods = ", ".join(repr(config.init_lora_weights) for config in configs)
        raise ValueError(
            f"calibrate: none of the configurations needs data (init_lora_weights={methods}); "
            "pass those of methods that do, e.g. eva or corda"
        )
    for plan in plans:
        assert plan.calibration is not None
        check_sets(plan.initializer.name, plan.calibration, batches, "batches")
    names = list(dict.fromkeys(target.name for plan in plans for target in plan.matrices))
    requests = list(dict.fromkeys(plan.calibration for plan in plans if plan.calibration))
    place = None if device is None else torch.device(device)
    found = collect_all(model, names, requests, batches, device=place)
    found.fingerprints = {name: fingerprint(weight) for name, weight in _weights(model, names)}
    return found


def calibrated(
    plan: Plan,
    model: nn.Module,
    calibration: Iterable[Any] | Mapping[str, Iterable[Any]] | Calibration | None,
    device: torch.device | None,
    cache: Cache | None = None,
) -> Iterator[Calibration]:
    """Yield the statistics of all targets, in one part or in several.

    Release each part before asking for the next one.

    Args:
        plan: a plan whose targets are single matrices.

    Raises:
        ValueError: as `lora_init.calibration.collect.collect_in_passes`, or an existing calibration
            does not fit the model or the method.
    """
    for part in _parts(plan, model, calibration, device, cache):
        yield with_layer_statistics(plan, part)


def _parts(
    plan: Plan,
    model: nn.Module,
    calibration: Iterable[Any] | Mapping[str, Iterable[Any]] | Calibration | None,
    device: torch.device | None,
    cache: Cache | None,
) -> Iterator[Calibration]:
    names = [target.name for target in plan.targets]
    request = plan.calibration
    if request is None:
        yield Calibration({CalibrationRequest(): {name: LayerStatistics() for name in names}})
        return
    assert calibration is not None  # else the call was refused
    if isinstance(calibration, Calibration):
        found = calibration.of(names, request, device)
        _check_fit(plan, model, found, calibration.fingerprints)
        yield found
    elif plan.sketches_gradients:
        sizes = plan.sketch_sizes
        assert sizes is not None
        found = collect_sketches(model, sizes, request, calibration, device=device)
        yield found.of(names, request, device)
    elif plan.calibration_memory is None or request.gradients:
        shapes = {target.name: target.shape for target in plan.targets}

        def collect(wanted: CalibrationRequest, batches: Iterable[Any]) -> Calibration:
            found = remembered(
                lambda: collect_all(model, names, [wanted], batches, device=device),
                cache, model, shapes, [wanted], batches, device,
            )  # fmt: skip
            return found.of(names, wanted, device)

        yield over_sets(request, calibration, collect)
    else:
        yield from collect_in_passes(
            model,
            names,
            request,
            calibration,
            memory=plan.calibration_memory,
            device=device,
        )


def for_allocation(plan: Plan, parts: Iterator[Calibration]) -> Calibration:
    """Merge all parts for a method that allocates ranks. Several parts are condensed first."""
    if plan.calibration_memory is None or not plan.calibration or plan.calibration.gradients:
        return next(parts)
    return merged(_condensed(plan, parts))


def _condensed(plan: Plan, parts: Iterator[Calibration]) -> Iterator[Calibration]:
    ranks = {target.name: plan.directions(target) or target.shape[1] for target in plan.targets}
    for part in parts:
        small = part.condensed(ranks)
        del part  # otherwise its covariances stay in memory during the next pass
        yield small


def _check_fit(
    plan: Plan, model: nn.Module, found: Calibration, fingerprints: dict[str, str]
) -> None:
    for target in plan.targets:
        inputs, gradient = found.layers[target.name].inputs, found.layers[target.name].gradient
        if isinstance(gradient, Tensor) and tuple(gradient.shape) != target.shape:
            raise ValueError(
                f"calibration: the gradient of {target.name!r} has shape {tuple(gradient.shape)}, "
                f"its weight {target.shape}; pass what lora_init.calibrate found on this model"
            )
        sets = inputs.sets.values() if isinstance(inputs, InputSets) else [inputs]
        for width in (len(each.mean) for each in sets if isinstance(each, InputStatistics)):
            if width != target.shape[1]:
                raise ValueError(
                    f"calibration: the inputs of {target.name!r} have width {width}, the model's "
                    f"have {target.shape[1]}; pass what lora_init.calibrate found on this model"
                )
    for name, weight in _weights(model, [target.name for target in plan.targets]):
        if name in fingerprints and not has_fingerprint(weight, fingerprints[name]):
            raise ValueError(
                f"calibration: it was collected with another weight of {name!r}; pass what "
                "lora_init.calibrate found on this model"
            )


def _weights(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The loaded weights of these layers, each with shape (out, in)."""
    for name, place in placed(model, names).items():
        if not place.parameter.is_meta:
            yield name, place.weight
