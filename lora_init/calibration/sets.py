"""Calibration sets: several named groups of batches in one call, such as "learn" and "keep".

A method that compares the inputs of two data sets names them in `CalibrationRequest.sets`. The
caller passes a dict of batches by name. Each set is collected like a calibration with one set, so
it has its own cache entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lora_init.calibration.batches import WithLoss, check_batches
from lora_init.calibration.result import Calibration
from lora_init.layer import LayerStatistics
from lora_init.linalg.moments import InputSets
from lora_init.registry import CalibrationRequest


def is_sets(batches: Any) -> bool:
    """Whether `batches` is a dict of sets. A dict with a tensor or a number is a single batch."""
    return type(batches) is dict and bool(batches) and all(map(_is_set, batches.values()))


def _is_set(value: Any) -> bool:
    if isinstance(value, WithLoss):
        return True
    if isinstance(value, list | tuple):
        return not value or not isinstance(value[0], int | float | str)
    return hasattr(value, "__iter__") and not isinstance(value, Tensor | Mapping | str | bytes)


def check_calibration(batches: Any, setting: str = "calibration") -> None:
    """Check the type of batches, or of each set, as `check_batches`.

    Raises:
        TypeError: names the setting and the fix.
    """
    if not is_sets(batches):
        check_batches(batches, setting)
        return
    for name, part in batches.items():
        check_batches(part, f"{setting}[{name!r}]")


def check_sets(
    method: str, request: CalibrationRequest, batches: Any, setting: str = "calibration"
) -> None:
    """Raise if a method gets other calibration sets than it reads.

    Raises:
        ValueError: the method reads one set and gets several, or the other way round.
    """
    if isinstance(batches, Calibration) or batches is None:
        return
    given = ", ".join(map(repr, batches)) if is_sets(batches) else "one unnamed set"
    if not request.sets and is_sets(batches):
        raise ValueError(
            f"{setting} with the sets {given} is not supported: must be one set of batches, which "
            f"{method} reads. Pass one of them, e.g. {setting}=sets[{next(iter(batches))!r}]"
        )
    if request.sets and not (is_sets(batches) and set(batches) == set(request.sets)):
        shown = ", ".join(f"{name!r}: batches" for name in request.sets)
        raise ValueError(
            f"{setting} with {given} is not supported: must be a dict with the sets "
            f"{', '.join(map(repr, request.sets))}, which {method} compares. Pass "
            f"{setting}={{{shown}}}"
        )


def over_sets(
    request: CalibrationRequest,
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    collect: Callable[[CalibrationRequest, Iterable[Any]], Calibration],
) -> Calibration:
    """The statistics of one request: `collect` is called once, or once per set."""
    if not request.sets:
        return collect(request, batches)
    assert isinstance(batches, Mapping)  # else the call was refused
    single = replace(request, sets=())
    return joined_sets(request, {name: collect(single, batches[name]) for name in request.sets})


def joined_sets(request: CalibrationRequest, parts: Mapping[str, Calibration]) -> Calibration:
    """Combine the results of the sets. Layers that share inputs in every set share the result."""
    known = [part.layers for part in parts.values()]
    layers: dict[str, LayerStatistics] = {}
    shared: dict[tuple[int, ...], InputSets] = {}
    for name in known[0]:
        if all(name in found for found in known):
            inputs = [found[name].inputs for found in known]
            both = InputSets(dict(zip(parts, inputs, strict=True)))
            layers[name] = LayerStatistics(shared.setdefault(tuple(map(id, inputs)), both))
    tokens, batches = (sum(getattr(p, n) for p in parts.values()) for n in ("tokens", "batches"))
    return Calibration({request: layers}, tokens, batches)
