"""Calibration: one pass over the data collects what data-driven initializers need.

For every **distinct** input of the targeted layers (query, key and value projections usually read
one tensor) the pass accumulates, over all unmasked tokens x (rows of shape (in,)),

    mean = sum x / tokens  (in,),    covariance = sum (x - mean)(x - mean)ᵀ / tokens  (in, in),

from which second_moment = sum x xᵀ / tokens follows. Sums are taken about a shift near the mean, in
float32, or in float64 where a method reads the directions of least variance, too. Or, for methods
that ask for it, it takes the loss's gradients (see `lora_init.calibration.gradients`). The model
runs in eval
mode, and is left as it was.

If the sums of all inputs do not fit into memory, several passes are made, each for the inputs that
fit. The data are read from beginning to end once a pass.

Under `torch.distributed` every rank runs batches of its own, as many as it has, and the sums are
reduced in float64: all ranks get what one process would get from all the data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lora_init.calibration.batches import Counted, WithLoss, check_count, forward, home, moved
from lora_init.calibration.gradients import collect_gradients, own_loss
from lora_init.calibration.hooks import Label, Observer
from lora_init.calibration.memory import Budget, statistics_of
from lora_init.calibration.result import Calibration
from lora_init.calibration.sums import Moments, joined_over_ranks
from lora_init.distributed import all_or_none, from_ranks, over_ranks
from lora_init.layer import LayerStatistics
from lora_init.linalg.transfer import on_host
from lora_init.registry import CalibrationRequest, sums_dtype

__all__ = ["Calibration", "LayerStatistics", "collect", "collect_all", "collect_in_passes"]


def collect(
    model: nn.Module,
    names: Iterable[str],
    request: CalibrationRequest,
    batches: Iterable[Any],
    *,
    device: torch.device | None = None,
) -> Calibration:
    """Run `batches` through `model` once and collect the statistics of the layers `names`.

    Args:
        model: the base model, not yet changed. Its training flags are restored afterwards.
        names: qualified names of the layers to observe.
        request: what to collect.
        batches: any iterable; a mapping is passed as keyword arguments, a list or tuple as
            positional ones, anything else as the only argument. Tensors move to the model's device.
        device: where the sums live; None keeps them beside the activations.

    Raises:
        ValueError: if there is no batch, a layer is never reached, or sees a non-finite value
            (each by name), or the batches are exhausted by an earlier use.
        RuntimeError: another rank failed.
    """
    return collect_all(model, names, [request], batches, device=device)


def collect_all(
    model: nn.Module,
    names: Iterable[str],
    requests: Collection[CalibrationRequest],
    batches: Iterable[Any],
    *,
    device: torch.device | None = None,
) -> Calibration:
    """`collect` for several requests: one pass for all that read inputs, one for gradients."""
    names = list(names)
    whole = Calibration()
    for_inputs = [request for request in requests if not request.gradients]
    if for_inputs:
        budget = Budget(dtype=sums_dtype(for_inputs))
        whole = _collect_inputs(model, names, for_inputs, batches, budget, device)
    for request in set(requests) - set(for_inputs):
        found = _collect_gradients(model, names, request, batches, device)
        whole = Calibration(whole.requests | found.requests, found.tokens, found.batches)
    return whole


def collect_in_passes(
    model: nn.Module,
    names: Iterable[str],
    request: CalibrationRequest,
    batches: Iterable[Any],
    *,
    memory: int,
    device: torch.device | None = None,
) -> Iterator[Calibration]:
    """`collect`, with the sums of so many inputs at a time as fit into memory.

    Whether a pass has room for an input is decided when it first appears, so that layers that share
    one count once. What is yielded must be let go before the next is asked for.

    Args:
        batches: as of `collect`; a list or loader, unless one pass is enough.
        memory: in bytes.

    Yields:
        The statistics of some of the layers, until it was every layer's turn.

    Raises:
        ValueError: also if the batches can be read only once, and a second pass is needed.
    """
    waiting = list(names)
    while waiting:
        budget = Budget(memory, sums_dtype([request]))
        found = _collect_inputs(model, waiting, [request], batches, budget, device)
        if not found.layers:
            raise ValueError(
                f"calibration_memory={memory}: the inputs that {waiting[0]!r} reads in the course "
                "of the data do not fit together; pass more"
            )
        waiting = [name for name in waiting if name not in found.layers]
        yield found
        del found  # else it would be in memory beside the next


def _collect_gradients(
    model: nn.Module,
    names: list[str],
    request: CalibrationRequest,
    batches: Iterable[Any],
    device: torch.device | None,
) -> Calibration:
    counted = Counted(batches)
    loss = getattr(batches, "loss", own_loss)
    gradients = collect_gradients(model, names, counted, loss=loss, device=device)
    layers = {name: LayerStatistics(gradient=found) for name, found in gradients.items()}
    tokens, count = over_ranks(torch.tensor([counted.tokens, counted.count], device="cpu")).tolist()
    return Calibration({request: layers}, tokens, count)


def _collect_inputs(
    model: nn.Module,
    names: list[str],
    requests: Collection[CalibrationRequest],
    batches: Iterable[Any],
    budget: Budget,
    device: torch.device | None,
) -> Calibration:
    """One pass; layers for which the budget has no room are left out."""
    batches = batches.batches if isinstance(batches, WithLoss) else batches
    modules = {name: model.get_submodule(name) for name in names}
    labels = {request.ignore_label for request in requests}
    observer = Observer(modules, labels, budget, device)
    counted = Counted(batches)
    with all_or_none("calibration"), observer.observing(model), torch.no_grad():
        for batch in counted:
            with observer.batch(batch):
                forward(model, moved(batch, home(model)))
            if observer.deferred and isinstance(batches, Iterator):
                raise ValueError(_only_once(budget, observer.deferred))
    tokens, count = over_ranks(torch.tensor([counted.tokens, counted.count], device="cpu")).tolist()
    check_count(count)
    totals = list(_reduced(observer))
    _check_finite([(keys[0][0], total) for keys, total in totals])
    layers = {request: {} for request in requests}
    while totals:
        keys, total = totals.pop(0)
        found = statistics_of(total)
        for name, label in keys:
            for request in requests:
                if request.ignore_label == label:
                    layers[request][name] = LayerStatistics(inputs=found)
    return Calibration(layers, tokens, count)


def _reduced(observer: Observer) -> Iterator[tuple[list[tuple[str, Label]], Moments]]:
    """Layers and labels that share their inputs, and the moments of these over all ranks.

    Which layers share their inputs, and which found no room, is known by each rank for itself; what
    is shared on every rank is shared.
    """
    own = observer.sources()
    numbers = {sources: number for number, sources in enumerate(dict.fromkeys(own.values()))}
    everywhere = from_ranks({key: numbers[sources] for key, sources in own.items()})
    sharers: dict[tuple[int, ...], list[tuple[str, Label]]] = {}
    for key in own:
        if all(key in numbered for numbered in everywhere):
            sharers.setdefault(tuple(numbered[key] for numbered in everywhere), []).append(key)
    uses = Counter(source for keys in sharers.values() for source in own[keys[0]])
    for keys in sharers.values():
        name, _ = keys[0]
        total = joined_over_ranks(observer.total(name, own[keys[0]]))
        for source in own[keys[0]]:
            uses[source] -= 1
            if not uses[source]:  # a reduced total is another tensor
                observer.release(source)
        if total.tokens == 0:
            raise ValueError(
                f"calibration: no token reached the target {name!r}; exclude it "
                "(exclude_modules) or pass batches that use it"
            )
        yield keys, total


def _check_finite(totals: Collection[tuple[str, Moments]]) -> None:
    """Refuse non-finite inputs by name. Each device is waited for once."""
    # The trace is a sum of squares: it is finite exactly if every value seen was (or their squares
    # left float32's range, which no decomposition survives either).
    traces = [moments.variance + moments.mean.sum() for _, moments in totals]
    for (name, _), trace in zip(totals, on_host(traces), strict=True):
        if not math.isfinite(trace):
            raise ValueError(
                f"calibration: the inputs of {name!r} are not finite; check the batches, the "
                "model's weights, and its dtype (float16 overflows at 65504)"
            )


def _only_once(budget: Budget, deferred: Collection[str]) -> str:
    return (
        f"calibration_memory={budget.memory} has no room for the inputs of {min(deferred)!r} "
        "together with those of other layers. The batches must be read again, and a generator "
        "gives them once; pass a list or a loader, or more memory"
    )
