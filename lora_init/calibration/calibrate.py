"""Collect the statistics that a plan needs, from batches or from an existing `Calibration`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
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
from lora_init.linalg.moments import GradientSketch, InputSets, InputStatistics, StackedInputs
from lora_init.linalg.precision import wide_device
from lora_init.plan.attention import attention_targets, split_on_success
from lora_init.plan.make import check_model, checked_config, make_plan
from lora_init.plan.new_weights import with_new_heads
from lora_init.plan.plan import Plan, Target
from lora_init.plan.sharded import check_sharded_calibration
from lora_init.registry import CalibrationRequest
from lora_init.weights.fingerprint import fingerprint, has_fingerprint
from lora_init.weights.kinds import known_format


def calibrate(
    model: nn.Module,
    configs: LoraConfig | Sequence[LoraConfig],
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    *,
    calibration_memory: int | None = None,
    device: str | torch.device | None = None,
) -> Calibration:
    """Run calibration once for several configurations of `get_peft_model`.

    The result fits any rank; sketches fit ranks up to those of the configurations. One pass
    collects the moments of all inputs. Methods that need gradients add a second pass::

        found = calibrate(model, [eva, corda], batches)
        model = get_peft_model(model, eva, calibration=found)

    Args:
        model: the base model. It is not changed. Under `torch.distributed` every rank passes
            different batches and gets the statistics of all of them.
        configs: the configurations whose target layers are observed. Their ranks only matter for
            sketches.
        batches: as `calibration` of `get_peft_model`. Must be a list or a loader if both passes are
            needed; a dict of sets for methods that compare several.
        calibration_memory: bytes for the statistics, which are all in memory together. If gradients
            do not fit, the result holds sketches of them for the ranks of these configurations, as
            for `get_peft_model`.
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
    with split_on_success(model, attention_targets(model, configs), join_after=True):
        return _collected(model, configs, batches, device, calibration_memory)


def _collected(
    model: nn.Module,
    configs: Sequence[LoraConfig],
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    device: str | torch.device | None,
    calibration_memory: int | None,
) -> Calibration:
    plans = [
        plan
        for config in configs
        if (plan := make_plan(model, config, calibration_memory=calibration_memory)).calibration
    ]
    if not plans:
        methods = ", ".join(repr(config.init_lora_weights) for config in configs)
        raise ValueError(
            f"calibrate: none of the configurations needs data (init_lora_weights={methods}); "
            "pass those of methods that do, e.g. eva or corda"
        )
    for plan in plans:
        assert plan.calibration is not None
        _check_together(plan)
        check_sets(plan.initializer.name, plan.calibration, batches, "batches")
        targets = [target.name for target in plan.targets]
        check_sharded_calibration(
            model, targets, plan.initializer.name, batches, gradients=plan.calibration.gradients
        )
    names = list(dict.fromkeys(target.name for plan in plans for target in plan.matrices))
    requests = list(dict.fromkeys(plan.calibration for plan in plans if plan.calibration))
    place = None if device is None else wide_device(torch.device(device))
    sketched = [plan for plan in plans if plan.sketches_gradients]
    # Whole gradients serve all methods, so they are collected if one method must have them.
    whole = {plan.calibration for plan in plans if not plan.sketches_gradients}
    sizes: dict[str, int] = {}
    for plan in sketched:
        for name, size in (plan.sketch_sizes or {}).items():
            sizes[name] = max(size, sizes.get(name, 0))
    found = Calibration()
    if rest := [request for request in requests if request in whole]:
        found = collect_all(model, names, rest, batches, device=place)
    for request in (request for request in requests if request not in whole):
        sketches = collect_sketches(model, sizes, request, batches, device=place)
        found = Calibration(found.requests | sketches.requests, sketches.tokens, sketches.batches)
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
    # A loop's variable would keep the part in memory during the next pass.
    parts = _parts(plan, model, calibration, device, cache)
    yield from map(partial(with_layer_statistics, plan), parts)


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
        if isinstance(gradient, GradientSketch):
            _check_sketch(plan, target, gradient)
        if isinstance(gradient, Tensor) and tuple(gradient.shape) != target.shape:
            raise ValueError(
                f"calibration: the gradient of {target.name!r} has shape {tuple(gradient.shape)}, "
                f"its weight {target.shape}; pass what lora_init.calibrate found on this model"
            )
        sets = inputs.sets.values() if isinstance(inputs, InputSets) else [inputs]
        of_groups = [each.members if isinstance(each, StackedInputs) else [each] for each in sets]
        if inputs is not None and any(len(each) != target.groups for each in of_groups):
            raise ValueError(
                f"calibration: the inputs of {target.name!r} have {len(of_groups[0])} groups, the "
                f"model's have {target.groups}; pass what lora_init.calibrate found on this model"
            )
        members = [one for each in of_groups for one in each]
        for width in (len(each.mean) for each in members if isinstance(each, InputStatistics)):
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


def _check_together(plan: Plan) -> None:
    """Raise if statistics that cannot be sketched exceed the memory."""
    limit, needed = plan.calibration_memory, plan.statistics_bytes
    if limit is not None and needed > limit:
        raise ValueError(
            f"calibration_memory={limit}: all statistics for {plan.initializer.name} take {needed} "
            "bytes together; pass as many, or pass calibration_memory and the batches to "
            "get_peft_model, which releases the statistics of each layer"
        )


def _check_sketch(plan: Plan, target: Target, sketch: GradientSketch) -> None:
    """Raise if a sketch has fewer triplets than the method needs at this rank."""
    needed, rows, columns = plan.sketch_sizes, len(sketch.left), len(sketch.right)
    if needed is None:
        raise ValueError(
            f"calibration: it holds sketches of gradients, and {plan.initializer.name} reads whole "
            "gradients; run lora_init.calibrate with calibration_memory=None"
        )
    if (rows, columns) != target.shape:
        raise ValueError(
            f"calibration: the gradient of {target.name!r} has shape {(rows, columns)}, its weight "
            f"{target.shape}; pass what lora_init.calibrate found on this model"
        )
    if len(sketch.values) < needed[target.name]:
        raise ValueError(
            f"calibration: the sketch of {target.name!r} holds {len(sketch.values)} triplets, and "
            f"{plan.initializer.name} needs {needed[target.name]} at r={target.rank}; pass this "
            "configuration to lora_init.calibrate, too"
        )


def _weights(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The loaded weights of these layers that can be read, each with shape (out, in)."""
    for name, place in placed(model, names).items():
        if not place.parameter.is_meta and known_format(place.module).opaque(place.module) is None:
            yield name, place.weight
