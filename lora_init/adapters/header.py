"""Check the header of an adapter file: JSON in the metadata of the safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def check_header(header: Any, version: int) -> None:
    """Check the version of a header and the type of each part.

    Raises:
        ValueError: the version is not supported, or a part is missing or has a wrong type.
    """
    if not isinstance(header, dict):
        raise ValueError(
            f"the header of the adapter file must be a JSON object, not {header!r:.80}"
        )
    found = header.get("format_version")
    if found != version:
        raise ValueError(
            f"format_version={found!r} of the adapter file is not supported: must be {version}. "
            "Install the version of lora_init that saved it."
        )
    for name, (required, accepts) in PARTS.items():
        if name not in header:
            if required:
                raise ValueError(f"the header of the adapter file lacks {name!r}; it is damaged")
        elif not accepts(header[name]):
            raise ValueError(
                f"the header of the adapter file is damaged: {name!r} has a wrong type"
            )


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _vocabulary(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_embedding, value.values()))


def _embedding(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("shape"), list):
        return False
    shape = value["shape"]
    return (
        bool(shape)
        and all(isinstance(size, int) for size in shape)
        and isinstance(value.get("fingerprint", ""), str)
    )


PARTS: dict[str, tuple[bool, Callable[[Any], bool]]] = {
    "config": (True, lambda value: isinstance(value, dict)),
    "method": (True, lambda value: isinstance(value, str | dict | bool)),
    "quantized_base": (False, lambda value: isinstance(value, str)),
    "fingerprints": (False, _texts),
    "quantizers": (
        False,
        lambda value: isinstance(value, dict) and all(isinstance(q, dict) for q in value.values()),
    ),
    "checksums": (False, _texts),
    "core": (False, lambda value: isinstance(value, str)),
    "from_original_weights": (False, _texts),
    "modules_to_save": (False, _names),
    "copied_modules": (False, _names),
    "vocabulary": (False, _vocabulary),
}
"""For each part: whether it is required, and a check of its type."""
