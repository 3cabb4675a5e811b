"""Settings as plain JSON types, whatever library they come from.

Hydra, OmegaConf, numpy and torch have lists, mappings and numbers of their own. They train like
Python's, and fail when a configuration is written to a file.
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

    Sets are sorted. Dataclasses become mappings, enumerations their values, paths strings.

    Args:
        setting: the name of the value, for messages.

    Raises:
        TypeError: the value has no JSON form.
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
    if value is None or isinstance(value, bool):  # what an array or an enumeration held
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
