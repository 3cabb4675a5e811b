"""The calibration file: statistics as tensors and JSON, validated when read.

The format is safetensors. The header holds JSON (requests, their layers, the counts) and a
checksum over the JSON and the tensors. Layers that share statistics refer to the same object,
whose tensors are named "<number>.<name>". A request whose layers have several parts, such as two
calibration sets, lists its layers by part.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_init.cache import key
from lora_init.files import write_atomically
from lora_init.linalg.matrix import is_finite
from lora_init.linalg.moments import GradientSketch, InputStatistics, StackedInputs
from lora_init.registry import CalibrationRequest

HEADER_KEY = "lora_init_calibration"
CHECKSUM_KEY = "lora_init_checksum"
FORMAT_VERSION = 1
REQUIRED = ("ignore_label", "smallest", "gradients")
"""The settings of a request that every file has."""
LARGEST_COUNT = 2**53
"""Largest integer that float64 represents exactly: counts become float64 divisors."""


@dataclass(frozen=True)
class Content:
    """The validated content of a calibration file."""

    requests: dict[CalibrationRequest, dict[str, dict[str, Any]]]
    tokens: int
    batches: int
    fingerprints: dict[str, str]


def parts(request: CalibrationRequest) -> tuple[str, ...]:
    """The names of the parts of a layer's statistics."""
    if request.output_moments:
        return "gradient", "inputs", "output_moments"
    if request.sets:
        return request.sets
    return ("gradient" if request.gradients else "inputs",)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write the file atomically."""
    text = json.dumps({"format_version": FORMAT_VERSION, **metadata})
    plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    header = {HEADER_KEY: text, CHECKSUM_KEY: _checksum(text, plain)}
    write_atomically(path, lambda place: save_file(plain, place, metadata=header))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the JSON of a file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or is not a calibration file.
    """
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(f"no file {str(path)!r}; pass a file that Calibration.save wrote")
    if not path.is_file():  # reading a pipe would block
        raise ValueError(f"{path} is not a file; pass a file that Calibration.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Clone: BLAS rounds differently if the memory is not aligned like torch's.
            tensors = {name: file.get_tensor(name).clone() for name in file.offset_keys()}
        metadata = json.loads(header[HEADER_KEY]) if HEADER_KEY in header else {}
    except (SafetensorError, ValueError, RecursionError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); run lora_init.calibrate again") from error
    version = metadata.get("format_version") if isinstance(metadata, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{path} is not a calibration of this version; pass a file that Calibration.save wrote"
        )
    expected = header.get(CHECKSUM_KEY)
    if expected is not None and expected != _checksum(header[HEADER_KEY], tensors):
        raise ValueError(f"{path} is damaged (its checksum differs); run lora_init.calibrate again")
    return tensors, metadata


def described(
    requests: Mapping[CalibrationRequest, Mapping[str, Mapping[str, Any]]],
) -> tuple[dict, dict]:
    """Convert statistics, by request, part and layer, to named tensors and JSON."""
    tensors: dict[str, Tensor] = {}
    objects: dict[int, dict[str, Any]] = {}
    listed = []
    for request, by_part in requests.items():
        numbers: dict[str, dict[str, int]] = {}
        for part, layers in by_part.items():
            for name, found in layers.items():
                if id(found) not in objects:
                    objects[id(found)] = _described(found, len(objects), tensors)
                numbers.setdefault(part, {})[name] = objects[id(found)]["number"]
        layers = numbers if len(by_part) > 1 else next(iter(numbers.values()), {})
        listed.append({**_described_request(request), "layers": layers})
    return tensors, {"requests": listed, "objects": list(objects.values())}


def content(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Content:
    """Invert `described`; validate every type, shape and reference.

    Raises:
        ValueError: the tensors and the JSON are not a calibration.
    """
    left = dict(tensors)
    objects = [
        _restored(each, number, left) for number, each in enumerate(_list(metadata, "objects"))
    ]
    if left:
        raise ValueError(f"tensor {min(left)!r} is unknown")
    requests: dict[CalibrationRequest, dict[str, dict[str, Any]]] = {}
    for each in _list(metadata, "requests"):
        request = _request(each)
        layers = _entry(each, "layers", dict)
        first, *others = parts(request)
        by_part = layers if others else {first: layers}
        requests[request] = {}
        for part in (first, *others):
            numbers = _entry(by_part, part, dict)
            if numbers.keys() != by_part[first].keys():
                raise ValueError(f"{part!r} has other layers than {first!r}")
            requests[request][part] = {n: _of(objects, numbers, n, part) for n in numbers}
    fingerprints = _entry(metadata, "fingerprints", dict)
    for name, text in fingerprints.items():
        _check_fingerprint(name, text)
    tokens, batches = (_count(metadata, name) for name in ("tokens", "batches"))
    return Content(requests, tokens, batches, fingerprints)


def _described_request(request: CalibrationRequest) -> dict[str, Any]:
    """The settings as JSON. Others than `REQUIRED` are left out where they are not set."""
    return {k: v for k, v in asdict(request).items() if k in REQUIRED or v}


def _described(found: Any, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Add one object's tensors to `tensors` and return its JSON."""
    if isinstance(found, Tensor):
        kind = "gradient" if found.ndim == 2 else "output_moments"
        tensors[f"{number}.{kind}"] = found
        return {"number": number, "kind": kind}
    if isinstance(found, StackedInputs):
        tensors[f"{number}.covariance"] = torch.stack([one.covariance for one in found.members])
        tensors[f"{number}.mean"] = found.mean
        return {"number": number, "kind": "stacked_moments", "values": {"tokens": found.tokens}}
    values = {f.name: getattr(found, f.name) for f in fields(found) if not f.name.startswith("_")}
    if isinstance(found, GradientSketch):
        tensors |= {f"{number}.{name}": value for name, value in values.items()}
        return {"number": number, "kind": "gradient_sketch"}
    tensors |= {f"{number}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
    plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    return {"number": number, "kind": "moments", "values": plain}


def _restored(found: Any, number: int, left: dict[str, Tensor]) -> Any:
    """Build one gradient or one input's statistics; remove its tensors from `left`."""
    if _count(found, "number") != number:
        raise ValueError(f"objects[{number}] has number={found['number']}")

    def tensor(name: str, *dtypes: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
        label = f"{number}.{name}"
        if label not in left:
            raise ValueError(f"tensor {label!r} is missing")
        value = left.pop(label)
        sizes = zip(shape, value.shape, strict=False)
        fits = len(shape) == value.ndim and all(want in (None, has) for want, has in sizes)
        if value.dtype not in dtypes or not fits:
            raise ValueError(f"tensor {label!r} is {value.dtype} of shape {tuple(value.shape)}")
        if not is_finite(value):
            raise ValueError(f"tensor {label!r} holds NaN or infinite values")
        return value

    kind = _entry(found, "kind", str)
    if kind == "gradient":
        return tensor("gradient", torch.float32, shape=(None, None))
    if kind == "output_moments":
        return tensor("output_moments", torch.float64, shape=(None,))
    if kind == "gradient_sketch":
        singular = tensor("values", torch.float32, shape=(None,))
        sides = [
            tensor(side, torch.float32, shape=(None, len(singular))) for side in ("left", "right")
        ]
        return GradientSketch(sides[0], singular, sides[1])
    groups = [None] if kind == "stacked_moments" else []
    mean = tensor("mean", torch.float64, shape=(*groups, None))
    width = mean.shape[-1]
    values = _entry(found, "values", dict)
    tokens = _count(values, "tokens")
    if kind in ("moments", "stacked_moments"):
        shape = *mean.shape, width
        covariance = tensor("covariance", torch.float32, torch.float64, shape=shape)
        if kind == "moments":
            return InputStatistics(covariance, mean, tokens)
        if not len(mean):
            raise ValueError("stacked_moments has no members")
        pairs = zip(covariance, mean, strict=True)
        return StackedInputs([InputStatistics(*pair, tokens) for pair in pairs])
    if kind == "sketch":
        raise ValueError(
            "it holds sketches of the inputs, which this version does not read any more"
        )
    raise ValueError(
        f"kind={kind!r} must be moments, stacked_moments, gradient, gradient_sketch or "
        "output_moments"
    )


def _request(found: Any) -> CalibrationRequest:
    label = _entry(found, "ignore_label", int, type(None))
    flags = {name: _entry(found, name, bool) for name in REQUIRED[1:]}
    sets = _entry({"sets": [], **found}, "sets", list)
    if not all(isinstance(name, str) for name in sets) or len(set(sets)) != len(sets):
        raise ValueError("sets must be different names")
    outputs = _entry({"output_moments": False, **found}, "output_moments", bool)
    return CalibrationRequest(label, **flags, output_moments=outputs, sets=tuple(sets))


def _of(objects: list[Any], layers: Mapping[str, Any], name: str, part: str) -> Any:
    number = _count(layers, name)
    if number >= len(objects):
        raise ValueError(f"layer {name!r} refers to object {number} of {len(objects)}")
    kinds = {"gradient": 2, "output_moments": 1}
    if part == "gradient" and isinstance(objects[number], GradientSketch):
        return objects[number]
    if getattr(objects[number], "ndim", None) != kinds.get(part):
        raise ValueError(f"layer {name!r} refers to statistics of another kind")
    return objects[number]


def _check_fingerprint(name: str, text: Any) -> None:
    try:
        fits = isinstance(text, str) and len(base64.b64decode(text, validate=True)) % 2 == 0
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"the fingerprint of {name!r} is not base64 of 16-bit numbers")


def _entry(values: Any, name: str, *types: type) -> Any:
    if not isinstance(values, Mapping) or name not in values:
        raise ValueError(f"{name!r} is missing")
    # An exact comparison, because bool is a subclass of int.
    if type(values[name]) not in types:
        raise ValueError(f"{name}={values[name]!r:.80} must be {types[0].__name__}")
    return values[name]


def _list(values: Any, name: str) -> list[Any]:
    return _entry(values, name, list)


def _count(values: Any, name: str) -> int:
    value = _entry(values, name, int)
    if not 0 <= value <= LARGEST_COUNT:
        raise ValueError(f"{name} must be between 0 and {LARGEST_COUNT}")
    return value


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    return key("calibration file", FORMAT_VERSION, text, dict(tensors))
