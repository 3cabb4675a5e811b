"""Calibration: one pass over the data collects what data-driven initializers need.

For every **distinct** input of the targeted layers, the pass accumulates over all unmasked tokens x
(rows of shape (in,)). Query, key and value projections usually share one input.

    mean = sum x / tokens  (in,),    covariance = sum (x - mean)(x - mean)ᵀ / tokens  (in, in)

The groups of a grouped convolution have separate moments of their patches, in a `StackedInputs`.
The second moment sum x xᵀ / tokens follows from both. Sums are taken about a shift near the mean.
They are float32, or float64 for methods that read the directions of least variance. Methods can
request gradients of the loss instead (see `lora_init.calibration.gradients`). The model runs in
eval mode and is restored afterwards.

If the sums of all inputs do not fit into memory, several passes run, each for the inputs that fit.
Every pass reads all the data.

Under `torch.distributed` every rank runs different batches; their number may differ. The sums are
reduced in float64, and all ranks get the result that one process would get from all the data.
Ranks that share a model by tensor parallelism run the same batches, which count once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.calibration.batches import Counted, WithLoss, check_count, forward, home, moved
from lora_init.calibration.gradients import collect_gradients, own_loss
from lora_init.calibration.hooks import Label, Observer
from lora_init.calibration.memory import Budget, statistics_of
from lora_init.calibration.places import placed
from lora_init.calibration.result import Calibration
from lora_init.calibration.sets import joined_sets, over_sets
from lora_init.calibration.sketch import sketch_gradients
from lora_init.calibration.sums import Moments, joined_over_ranks
from lora_init.distributed import all_or_none, from_ranks, over_ranks
from lora_init.layer import LayerStatistics
from lora_init.linalg.moments import InputStatistics, StackedInputs
from lora_init.linalg.transfer import on_host
from lora_init.registry import POWERS, CalibrationRequest, sums_dtype
from lora_init.weights.sharded import readers_of_a_batch

__all__ = ["Calibration", "LayerStatistics", "collect", "collect_all", "collect_in_passes"]


def collect(
    model: nn.Module,
    names: Iterable[str],
    request: CalibrationRequest,
    batches: Iterable[Any],
    *,
    device: torch.device | None = None,
) -> Calibration:
    """Run `batches` through `model` once and return the statistics of the layers `names`.

    Args:
        model: the base model without an adapter. Its training flags are restored afterwards.
        names: qualified names of the layers to observe.
        request: what to collect.
        batches: any iterable. A mapping is passed as keyword arguments, a list or tuple as
            positional ones, anything else as the only argument. Tensors move to the model's device.
        device: where the sums are stored. None stores them on the device of the activations.

    Raises:
        ValueError: no batch was passed, a layer is never reached, or its input is not finite.
            The message names the layer.
        RuntimeError: another rank failed.
    """
    return collect_all(model, names, [request], batches, device=device)


def collect_all(
    model: nn.Module,
    names: Iterable[str],
    requests: Collection[CalibrationRequest],
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    *,
    device: torch.device | None = None,
) -> Calibration:
    """Serve several requests of `collect`: one pass for all moments, one pass for gradients.

    Requests for several sets make these passes over each set; `batches` is then a dict of them.
    """
    names = list(names)
    in_sets = [request for request in requests if request.sets]
    if in_sets:
        whole = Calibration()
        for request in in_sets:
            found = over_sets(
                request, batches,
                lambda single, some: collect_all(model, names, [single], some, device=device),
            )  # fmt: skip
            whole = Calibration(whole.requests | found.requests, found.tokens, found.batches)
        return whole
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
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    *,
    memory: int,
    device: torch.device | None = None,
) -> Iterator[Calibration]:
    """Collect statistics in several passes, each for as many inputs as fit into memory.

    An input takes its share of the memory when it first appears, so layers that share an input
    count once. Release each result before asking for the next one.

    Args:
        batches: as for `collect`. Must be a list or a loader if one pass is not enough.
        memory: limit in bytes.

    Yields:
        The statistics of some layers, until all layers are done.

    Raises:
        ValueError: as `collect`, or a second pass is needed and the batches can be read only once.
    """
    waiting = list(names)
    while waiting:
        found = _collect_pass(model, waiting, request, batches, memory, device)
        if not found.layers:
            raise ValueError(
                f"calibration_memory={memory}: the inputs that {waiting[0]!r} reads do not fit "
                "together; pass a larger limit"
            )
        waiting = [name for name in waiting if name not in found.layers]
        yield found
        del found  # otherwise it stays in memory during the next pass


def collect_sketches(
    model: nn.Module,
    sizes: Mapping[str, int],
    request: CalibrationRequest,
    batches: Iterable[Any],
    *,
    device: torch.device | None = None,
) -> Calibration:
    """Collect the leading triplets of gradients, `sizes` of them by layer name, in several passes.

    Raises:
        ValueError: as `collect`, or the batches can be read only once.
    """
    plain = batches.batches if isinstance(batches, WithLoss) else batches
    loss = getattr(batches, "loss", own_loss)
    counted = Counted(plain)
    repeated = plain if isinstance(plain, Iterator) else counted
    found = sketch_gradients(model, sizes, repeated, loss=loss, device=device)
    layers = {name: LayerStatistics(gradient=sketch) for name, sketch in found.items()}
    tally = torch.tensor([counted.tokens, counted.count], device="cpu")
    passes = 2 * (POWERS + 1)
    tokens, count = (number // passes for number in over_ranks(tally).tolist())
    return Calibration({request: layers}, tokens, count)


def _collect_pass(
    model: nn.Module,
    names: list[str],
    request: CalibrationRequest,
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    memory: int,
    device: torch.device | None,
) -> Calibration:
    """Collect the layers that fit. Each set of a request gets an equal part of the memory."""
    dtype = sums_dtype([request])
    if not request.sets:
        return _collect_inputs(model, names, [request], batches, Budget(memory, dtype), device)
    assert isinstance(batches, Mapping)  # else the call was refused
    single, parts = replace(request, sets=()), {}
    for name in request.sets:  # the layers that fitted in the sets before
        budget = Budget(memory // len(request.sets), dtype)
        parts[name] = _collect_inputs(model, names, [single], batches[name], budget, device)
        names = list(parts[name].layers)
    return joined_sets(request, parts)


def _collect_gradients(
    model: nn.Module,
    names: list[str],
    request: CalibrationRequest,
    batches: Iterable[Any],
    device: torch.device | None,
) -> Calibration:
    counted = Counted(batches)
    loss = getattr(batches, "loss", own_loss)
    if not request.output_moments:
        gradients = collect_gradients(model, names, counted, loss=loss, device=device)
        layers = {name: LayerStatistics(gradient=found) for name, found in gradients.items()}
    else:
        layers = _collect_with_outputs(model, names, request, counted, loss, device)
    tokens, count = over_ranks(torch.tensor([counted.tokens, counted.count], device="cpu")).tolist()
    return Calibration({request: layers}, tokens, count)


def _collect_with_outputs(
    model: nn.Module,
    names: list[str],
    request: CalibrationRequest,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    device: torch.device | None,
) -> dict[str, LayerStatistics]:
    """The gradient, the inputs' moments and the output moments of each layer, from one pass."""
    budget = Budget(dtype=sums_dtype([request]))
    observer = Observer(placed(model, names), {request.ignore_label}, budget, device)
    squares: dict[str, Tensor] = {}
    gradients = collect_gradients(
        model, names, batches, loss=loss, device=device, observer=observer, squares=squares
    )
    inputs = _statistics(observer)
    return {
        name: LayerStatistics(
            inputs[name, request.ignore_label],
            gradients[name],
            # No token may have reached an expert.
            squares[name] / max(inputs[name, request.ignore_label].tokens, 1),
        )
        for name in names
    }


def _collect_inputs(
    model: nn.Module,
    names: list[str],
    requests: Collection[CalibrationRequest],
    batches: Iterable[Any],
    budget: Budget,
    device: torch.device | None,
) -> Calibration:
    """Run one pass. Layers that the budget has no room for are left out."""
    batches = batches.batches if isinstance(batches, WithLoss) else batches
    labels = {request.ignore_label for request in requests}
    observer = Observer(placed(model, names), labels, budget, device)
    counted = Counted(batches)
    with all_or_none("calibration"), observer.observing(model), torch.no_grad():
        for batch in counted:
            with observer.batch(batch):
                forward(model, moved(batch, home(model)))
            if observer.deferred and isinstance(batches, Iterator):
                raise ValueError(_only_once(budget, observer.deferred))
    tally = over_ranks(torch.tensor([counted.tokens, counted.count], device="cpu"))
    copies = readers_of_a_batch(model)
    tokens, count = (number // copies for number in tally.tolist())
    check_count(count)
    layers = {request: {} for request in requests}
    for (name, label), found in _statistics(observer, copies).items():
        for request in requests:
            if request.ignore_label == label:
                layers[request][name] = LayerStatistics(inputs=found)
    return Calibration(layers, tokens, count)


def _statistics(
    observer: Observer, copies: int = 1
) -> dict[tuple[str, Label], InputStatistics | StackedInputs]:
    """The moments by layer and label, over all ranks; layers that share inputs share an object.

    Args:
        copies: how many ranks have counted each row.

    Raises:
        ValueError: the inputs of a layer are not finite.
    """
    totals = list(_reduced(observer))
    _check_finite([(keys[0][0], total) for keys, groups in totals for total in groups])
    layers = {}
    while totals:
        keys, groups = totals.pop(0)
        once = (replace(total, tokens=total.tokens // copies) for total in groups)
        found = [statistics_of(total) for total in once]
        layers |= dict.fromkeys(keys, StackedInputs(found) if len(found) > 1 else found[0])
    return layers


def _reduced(observer: Observer) -> Iterator[tuple[list[tuple[str, Label]], list[Moments]]]:
    """Yield the layers and labels that share inputs, with each group's moments over all ranks.

    Moments of no token are those of an expert that the router did not choose.
    Each rank finds out for itself which layers share inputs and which do not fit. Layers share a
    result if they share inputs on every rank.
    """
    own = observer.sources()
    numbers = {sources: number for number, sources in enumerate(dict.fromkeys(own.values()))}
    everywhere = from_ranks({key: numbers[sources] for key, sources in own.items()})
    sharers: dict[tuple[int, ...], list[tuple[str, Label]]] = {}
    for key in own:
        if all(key in numbered for numbered in everywhere):
            # Experts that no token reached have no source. Their width decides then.
            width = observer.places[key[0]].shape[1]
            numbered = tuple(each[key] for each in everywhere)
            sharers.setdefault((*numbered, width), []).append(key)
    uses = Counter(source for keys in sharers.values() for source in own[keys[0]])
    for keys in sharers.values():
        name, _ = keys[0]
        totals = [joined_over_ranks(total) for total in observer.totals(name, own[keys[0]])]
        for source in own[keys[0]]:
            uses[source] -= 1
            if not uses[source]:  # the reduced total is a different tensor
                observer.release(source)
        if totals[0].tokens == 0 and observer.places[name].expert is None:
            raise ValueError(
                f"calibration: no token reached the target {name!r}; exclude it "
                "(exclude_modules) or pass batches that use it"
            )
        yield keys, totals


def _check_finite(totals: Collection[tuple[str, Moments]]) -> None:
    """Raise if inputs are not finite. Waits for each device once."""
    # The trace is a sum of squares. It is finite if all values are, unless their squares overflow
    # float32, which no decomposition survives either.
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
        "together with those of other layers. A second pass is needed, but a generator can be "
        "read only once; pass a list or a loader, or a larger limit"
    )
