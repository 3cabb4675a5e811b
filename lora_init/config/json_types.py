"""Convert settings to plain JSON types.

Hydra, OmegaConf, numpy and torch define their own lists, mappings and numbers. These work during
training, but fail when a configuration is written to a file.
"""

from __future__ import annotations

import dataclasses
import enum
import numbers
import os
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
import torch


def json_value(setting: str, value: Any) -> Any:
    """Convert `value` to None, a bool, a number, a string, a list or a dict of these.

    Sets are sorted. Dataclasses become dicts, enumerations become their values, and paths become
    strings.

    Args:
        setting: the name of the setting, for messages.
        value: the value to convert.

    Raises:
        TypeError: JSON cannot represent the value.
    """
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().tolist()
    elif isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool):  # from an array or an enumeration
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {_key(setting, key): json_value(f"{setting}[{key!r}]", value[key]) for key in value}
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray | memoryview):
        items = [json_value(setting, item) for item in value]
        ordered = not isinstance(value, Set) or isinstance(value, type({}.keys()))
        return items if ordered else sorted(items, key=lambda item: (str(type(item)), item))
    raise TypeError(
        f"{setting}={value!r} is not supported: must be None, a bool, a number, a string, a list "
        f"or a mapping, not a {type(value).__name__}. Pass one of these."
    )


def _key(setting: str, key: Any) -> str:
    key = key.value if isinstance(key, enum.Enum) else key
    if isinstance(key, str):
        return str(key)
    raise TypeError(
        f"{setting}: the key {key!r} is not supported: must be a string, not a "
        f"{type(key).__name__}. Write it in quotes."
    )
