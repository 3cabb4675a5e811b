"""Experts that too few calibration tokens reach get the statistics of their whole layer.

The inputs of an expert are the tokens that the router sends to it. With fewer tokens than the rank,
they do not determine r directions. The moments of the inputs of all experts of the layer then
replace its own. Likewise, the sum of all experts' gradients replaces a gradient that is zero.
Methods that read both, and the outputs' moments, get all of them from the whole layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_init.calibration.memory import statistics_of
from lora_init.calibration.result import Calibration
from lora_init.calibration.sums import Moments, joined
from lora_init.layer import LayerStatistics
from lora_init.linalg.moments import GradientSketch, InputSets, InputStatistics
from lora_init.plan.plan import Plan, Target


def with_layer_statistics(plan: Plan, found: Calibration) -> Calibration:
    """Replace the statistics of experts with too few tokens; warn with their number.

    Args:
        plan: a plan whose targets are single matrices.
        found: the statistics of some targets, with either all experts of a parameter or none.

    Raises:
        ValueError: no token reached any expert of a parameter.
    """
    if plan.calibration is None:
        return found
    groups: dict[str, list[Target]] = {}
    for target in plan.targets:
        if target.expert is not None and target.name in found.layers:
            groups.setdefault(target.name.rpartition(".")[0], []).append(target)
    replaced: dict[str, LayerStatistics] = {}
    for parameter, targets in groups.items():
        layers = [found.layers[target.name] for target in targets]
        poor = [t for t, layer in zip(targets, layers, strict=True) if _is_poor(t, layer)]
        if poor:
            whole = _of_layer(parameter, layers)
            replaced |= dict.fromkeys([target.name for target in poor], whole)
    if not replaced:
        return found
    count = sum(map(len, groups.values()))
    warnings.warn(
        f"calibration: {len(replaced)} of {count} experts' matrices got fewer tokens than their "
        f"rank, the first is {next(iter(replaced))!r}. They start from the statistics of all "
        "experts of their layer; pass more batches to give each its own",
        stacklevel=2,
    )
    (request,) = found.requests
    layers = {**found.layers, **replaced}
    return Calibration({request: layers}, found.tokens, found.batches, found.fingerprints)


def _is_poor(target: Target, layer: LayerStatistics) -> bool:
    if layer.inputs is not None:
        return any(one.tokens < target.rank for one in _sets(layer.inputs).values())
    gradient: Any = layer.gradient
    return not bool((gradient.values if isinstance(gradient, GradientSketch) else gradient).any())


def _of_layer(parameter: str, layers: Sequence[LayerStatistics]) -> LayerStatistics:
    """The statistics of all experts together."""
    gradient, squares, inputs = None, None, None
    if layers[0].gradient is not None:
        gradients: list[Any] = [layer.gradient for layer in layers]
        dense = [g.dense() if isinstance(g, GradientSketch) else g for g in gradients]
        gradient = torch.zeros_like(dense[0])
        for one in dense:
            gradient += one
    if layers[0].inputs is not None:
        sets = [_sets(layer.inputs) for layer in layers]
        pooled = {name: _pooled(parameter, [one[name] for one in sets]) for name in sets[0]}
        inputs = pooled[""] if "" in pooled else InputSets(pooled)
    if layers[0].output_moments is not None:
        pairs: list[Any] = [(layer.output_moments, layer.inputs) for layer in layers]
        tokens = sum(moments.tokens for _, moments in pairs)
        squares = sum(outputs * moments.tokens for outputs, moments in pairs) / tokens
    return LayerStatistics(inputs, gradient, squares)


def _pooled(parameter: str, inputs: Sequence[InputStatistics]) -> InputStatistics:
    read = [one for one in inputs if one.tokens]
    if not read:
        raise ValueError(
            f"calibration: no token reached the target {parameter!r}; leave it out of "
            "target_parameters or pass batches that use it"
        )
    return statistics_of(joined([_moments(one) for one in read]))


def _moments(inputs: InputStatistics) -> Moments:
    variance: Tensor = inputs.covariance.diagonal().sum().double()
    return Moments(inputs.tokens, inputs.mean, inputs.covariance, variance)


def _sets(inputs: Any) -> Mapping[str, InputStatistics]:
    """The moments by set; "" names the inputs of a method that reads one set."""
    return inputs.sets if isinstance(inputs, InputSets) else {"": inputs}
