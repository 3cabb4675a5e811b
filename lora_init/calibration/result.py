"""The result of calibration: statistics by layer, in memory or in a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_init.calibration import file
from lora_init.layer import LayerStatistics
from lora_init.linalg.moments import InputSets
from lora_init.registry import CalibrationRequest


@dataclass
class Calibration:
    """Calibration statistics by request and layer name.

    They do not depend on ranks or other settings, so one result fits a whole sweep.
    `lora_init.calibrate` creates it; pass it to `get_peft_model(..., calibration=…)`.

    Attributes:
        requests: statistics by request and layer. Layers that read the same inputs share one
            object.
        tokens, batches: numbers of unmasked tokens and of batches, summed over all ranks.
        fingerprints: by layer, the fingerprint of its weight (see
            `lora_init.weights.fingerprint`). May be empty.
    """

    requests: dict[CalibrationRequest, dict[str, LayerStatistics]] = field(default_factory=dict)
    tokens: int = 0
    batches: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, LayerStatistics]:
        """Statistics by layer name; requires that at most one request was made."""
        (layers,) = self.requests.values() or [{}]
        return layers

    def of(
        self, names: Iterable[str], request: CalibrationRequest, device: torch.device | None = None
    ) -> Calibration:
        """Select the statistics of one request and some layers.

        Args:
            device: target device. None leaves the tensors where they are.

        Raises:
            ValueError: the calibration lacks the request or one of the layers.
        """
        if request not in self.requests:
            raise ValueError(
                f"calibration: it holds the statistics for {_listed(self.requests)}, and {request} "
                "is needed; pass this configuration to lora_init.calibrate, too"
            )
        found = self.requests[request]
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(
                f"calibration: it has no statistics of the target {missing[0]!r}; pass this "
                f"configuration to lora_init.calibrate, too (it holds {len(found)} layers, e.g. "
                f"{next(iter(found))!r})"
            )
        layers = {name: found[name] for name in names}
        if device is not None:
            layers = _moved(layers, device)
        return Calibration({request: layers}, self.tokens, self.batches)

    def condensed(self, ranks: Mapping[str, int]) -> Calibration:
        """Reduce the statistics to the leading components that these ranks need."""
        sharers: dict[int, list[str]] = {}
        for name, layer in self.layers.items():
            sharers.setdefault(id(layer.inputs), []).append(name)
        layers = {}
        for names in sharers.values():
            inputs = self.layers[names[0]].inputs.condensed(max(ranks[name] for name in names))
            layers |= {name: LayerStatistics(inputs=inputs) for name in names}
        return Calibration(dict.fromkeys(self.requests, layers), self.tokens, self.batches)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Convert to tensors by key and JSON-compatible metadata."""
        tensors, metadata = file.described(
            {
                request: {
                    part: {name: _part(statistics, part) for name, statistics in layers.items()}
                    for part in file.parts(request)
                }
                for request, layers in self.requests.items()
            }
        )
        return tensors, metadata | {
            "tokens": self.tokens,
            "batches": self.batches,
            "fingerprints": self.fingerprints,
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> Calibration:
        """Invert `to_tensors`.

        Raises:
            ValueError: an entry is missing, not finite, or has the wrong type or shape.
        """
        found = file.content(tensors, metadata)
        requests = {}
        for request, parts in found.requests.items():
            shared: dict[tuple[int, ...], InputSets] = {}
            requests[request] = {
                name: _statistics(request, {part: parts[part][name] for part in parts}, shared)
                for name in next(iter(parts.values()))
            }
        return cls(requests, found.tokens, found.batches, found.fingerprints)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file atomically."""
        file.write(Path(path), *self.to_tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged, is not a calibration file, or comes from a newer
                version.
        """
        tensors, metadata = file.read(Path(path))
        try:
            return cls.from_tensors(tensors, metadata)
        except ValueError as error:
            raise ValueError(
                f"{os.fspath(path)} is damaged ({error}); run lora_init.calibrate again"
            ) from error


def _part(statistics: LayerStatistics, part: str) -> Any:
    """One part of a layer's statistics, by its name in the file."""
    if isinstance(statistics.inputs, InputSets) and part in statistics.inputs.sets:
        return statistics.inputs[part]
    return getattr(statistics, part)


def _statistics(
    request: CalibrationRequest, parts: Mapping[str, Any], shared: dict[tuple[int, ...], InputSets]
) -> LayerStatistics:
    """Invert `_part`; layers whose sets are the same objects share one `InputSets`."""
    if not request.sets:
        return LayerStatistics(**parts)
    key = tuple(map(id, parts.values()))
    return LayerStatistics(shared.setdefault(key, InputSets(parts)))


def merged(parts: Iterable[Calibration]) -> Calibration:
    """Merge the layers of several passes over the same batches, for one request."""
    whole = Calibration()
    for part in parts:
        for request, layers in part.requests.items():
            whole.requests.setdefault(request, {}).update(layers)
        whole.tokens, whole.batches = part.tokens, part.batches
    return whole


def _moved(layers: dict[str, LayerStatistics], device: torch.device) -> dict[str, LayerStatistics]:
    """Move statistics to `device`; shared objects stay shared."""
    parts = [field.name for field in fields(LayerStatistics)]
    found = {id(part): part for layer in layers.values() for part in _values(layer, parts)}
    there = {key: None if part is None else part.to(device) for key, part in found.items()}
    return {
        name: LayerStatistics(*(there[id(part)] for part in _values(layer, parts)))
        for name, layer in layers.items()
    }


def _values(layer: LayerStatistics, parts: Iterable[str]) -> list[Any]:
    return [getattr(layer, part) for part in parts]


def _listed(requests: Iterable[CalibrationRequest]) -> str:
    return ", ".join(map(str, requests)) or "nothing"
