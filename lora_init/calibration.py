"""What calibration found out: statistics by layer, kept in memory or in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_init.adapters.atomic_file import write_atomically
from lora_init.moments import InputStatistics, LeadingComponents
from lora_init.quantization import Quantizer
from lora_init.registry import CalibrationRequest
from lora_init.sketch import SketchedStatistics

HEADER_KEY = "lora_init_calibration"
KINDS = {"moments": InputStatistics, "sketch": SketchedStatistics}


@dataclass
class LayerStatistics:
    """What is known about one layer beside its weight.

    Attributes:
        inputs: moments of its inputs, where the method asked for them.
        gradient: of the loss with respect to its weight, likewise.
        quantizer: how the base is quantised; None for a float base.
    """

    inputs: InputStatistics | SketchedStatistics | LeadingComponents | None = None
    gradient: Float[Tensor, "out in"] | None = None
    quantizer: Quantizer | None = None


@dataclass
class Calibration:
    """Statistics by request and layer name, and what they cost.

    Independent of ranks and of everything else a method does with them, so that one serves a whole
    sweep: `lora_init.calibrate` makes it, `get_peft_model(..., calibration=…)` takes it.

    Attributes:
        requests: what was collected; layers that read the same inputs share one object.
        tokens, batches: unmasked tokens and batches of the data, of all ranks together.
        fingerprints: of the layers' weights (see `lora_init.fingerprint`), where they were taken.
    """

    requests: dict[CalibrationRequest, dict[str, LayerStatistics]] = field(default_factory=dict)
    tokens: int = 0
    batches: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, LayerStatistics]:
        """By layer name, where no more than one request was made."""
        (layers,) = self.requests.values() or [{}]
        return layers

    def of(
        self, names: Iterable[str], request: CalibrationRequest, device: torch.device | None = None
    ) -> Calibration:
        """What one request found about some layers.

        Args:
            device: where to; None leaves everything where it is.

        Raises:
            ValueError: it was not made, or not of one of the layers.
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
                f"calibration: it knows nothing of the target {missing[0]!r}; pass this "
                f"configuration to lora_init.calibrate, too (it holds {len(found)} layers, e.g. "
                f"{next(iter(found))!r})"
            )
        layers = {name: found[name] for name in names}
        if device is not None:
            layers = _moved(layers, device)
        return Calibration({request: layers}, self.tokens, self.batches)

    def errors(self) -> dict[str, float]:
        """The share of their inputs' variance that sketches leave out, by layer."""
        inputs = {name: layer.inputs for name, layer in self.layers.items()}
        return {name: found.error for name, found in inputs.items() if found is not None}

    def condensed(self, ranks: Mapping[str, int]) -> Calibration:
        """The leading components of the inputs alone, as many as these layers need."""
        sharers: dict[int, list[str]] = {}
        for name, layer in self.layers.items():
            sharers.setdefault(id(layer.inputs), []).append(name)
        layers = {}
        for names in sharers.values():
            inputs = self.layers[names[0]].inputs.condensed(max(ranks[name] for name in names))
            layers |= {name: LayerStatistics(inputs=inputs) for name in names}
        return Calibration(dict.fromkeys(self.requests, layers), self.tokens, self.batches)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything as tensors by key, on the CPU, and metadata that JSON can say."""
        tensors: dict[str, Tensor] = {}
        objects: dict[int, dict[str, Any]] = {}
        requests = []
        for request, layers in self.requests.items():
            described = {}
            for name, statistics in layers.items():
                found = statistics.gradient if request.gradients else statistics.inputs
                if id(found) not in objects:
                    objects[id(found)] = _described(found, len(objects), tensors)
                described[name] = objects[id(found)]["number"]
            requests.append({**asdict(request), "layers": described})
        return tensors, {
            "requests": requests,
            "objects": list(objects.values()),
            "tokens": self.tokens,
            "batches": self.batches,
            "fingerprints": self.fingerprints,
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> Calibration:
        """The inverse of `to_tensors`."""
        objects = [_restored(described, tensors) for described in metadata["objects"]]
        requests = {}
        for described in metadata["requests"]:
            settings = {key: value for key, value in described.items() if key != "layers"}
            request = CalibrationRequest(**settings)
            part = "gradient" if request.gradients else "inputs"
            requests[request] = {
                name: LayerStatistics(**{part: objects[number]})
                for name, number in described["layers"].items()
            }
        return cls(
            requests, metadata["tokens"], metadata["batches"], dict(metadata["fingerprints"])
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        tensors, metadata = self.to_tensors()
        header = {HEADER_KEY: json.dumps({"format_version": 1, **metadata})}
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        write_atomically(Path(path), lambda place: save_file(tensors, place, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else, or was written by a newer version.
        """
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER_KEY)
            metadata = {} if header is None else json.loads(header)
            if metadata.get("format_version") != 1:
                raise ValueError(
                    f"{os.fspath(path)!r} is no calibration of this version; pass a file that "
                    "Calibration.save wrote"
                )
            return cls.from_tensors(
                {key: file.get_tensor(key) for key in file.offset_keys()}, metadata
            )


def merged(parts: Iterable[Calibration]) -> Calibration:
    """The layers of several passes over the same batches, for one request."""
    whole = Calibration()
    for part in parts:
        for request, layers in part.requests.items():
            whole.requests.setdefault(request, {}).update(layers)
        whole.tokens, whole.batches = part.tokens, part.batches
    return whole


def _moved(layers: dict[str, LayerStatistics], device: torch.device) -> dict[str, LayerStatistics]:
    """On `device`, what is shared still shared."""
    found = {id(part): part for layer in layers.values() for part in (layer.inputs, layer.gradient)}
    there = {key: None if part is None else part.to(device) for key, part in found.items()}
    return {
        name: LayerStatistics(there[id(layer.inputs)], there[id(layer.gradient)])
        for name, layer in layers.items()
    }


def _described(found: Any, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put a gradient's or an input's tensors among the others; returns what else it has."""
    if isinstance(found, Tensor):
        tensors[f"{number}.gradient"] = found.cpu()
        return {"number": number, "kind": "gradient"}
    kind = "sketch" if isinstance(found, SketchedStatistics) else "moments"
    values = {f.name: getattr(found, f.name) for f in fields(found) if not f.name.startswith("_")}
    tensors |= {f"{number}.{k}": v.cpu() for k, v in values.items() if isinstance(v, Tensor)}
    plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    return {"number": number, "kind": kind, "values": plain}


def _restored(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    prefix = f"{described['number']}."
    own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    if described["kind"] == "gradient":
        return own["gradient"]
    return KINDS[described["kind"]](**own, **described["values"])


def _listed(requests: Iterable[CalibrationRequest]) -> str:
    return ", ".join(map(str, requests)) or "nothing"
