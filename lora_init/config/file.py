"""Read `adapter_config.json` and convert its fields to settings of `LoraConfig`.

The files come from PEFT 0.2 or later, or from tools that add fields. The rules are:

- null, false, 0, "" and empty lists or mappings mean that a setting is unused;
- a setting whose switch is off is unused;
- the options of another initialization method are unused;
- unknown names are ignored with one warning, as in PEFT;
- other settings of PEFT that change the model's output raise an error.
"""

from __future__ import annotations

import difflib
import json
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lora_init.config.peft_fields import SWITCHES, with_own_options

CONFIG_NAME = "adapter_config.json"

FILE_ONLY = ("peft_type", "peft_version", "auto_mapping", "runtime_config")
"""Fields that describe how the file was written, not the adapter."""

FORMER_FIELDS = {"enable_lora": None, "merge_weights": False}
"""Fields of PEFT 0.2. `enable_lora` splits a layer; `merge_weights` never changes the output."""

LATER_FIELDS = {"astra_config": None}
"""Fields of PEFT after 0.21."""

METHODS_OF_CONFIGS = ("astra", "corda", "eva", "loftq", "lora_ga")
"""Methods whose options PEFT stores in a field `<name>_config`."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is a Git LFS pointer, is not valid JSON, or is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {str(path.parent)!r}; pass an adapter's folder")
    refuse_lfs_pointer(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({_reason(error)}); the file is damaged"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must contain a JSON object, not a {type(values).__name__}; the file is damaged"
        )
    return values


def refuse_lfs_pointer(path: Path) -> None:
    """Raise if Git LFS did not download the file.

    Raises:
        ValueError: the file is a Git LFS pointer.
    """
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`, or "
                "download the file"
            )


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def settings(
    values: Mapping[str, Any],
    known: Collection[str],
    unsupported: Mapping[str, Any],
    nested: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Convert the values of a file to keyword arguments of `LoraConfig`; drop unused settings.

    Args:
        values: the content of the file.
        known: the names of the fields of `LoraConfig`.
        unsupported: PEFT's other fields, with their defaults.
        nested: unsupported fields inside PEFT's options of methods, with their defaults.

    Raises:
        ValueError: the file is not a LoRA adapter's, a value has a wrong type, or the file uses a
            setting of PEFT that is not supported.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"an adapter configuration must be a mapping, not {values!r}")
    if "peft_type" not in values:
        raise ValueError(
            "peft_type is missing in the adapter configuration: must be 'LORA'. If this is a LoRA "
            'adapter, add "peft_type": "LORA".'
        )
    kind = values["peft_type"]
    if kind != "LORA":
        raise ValueError(f"peft_type={kind!r} is not supported: must be 'LORA'")
    values = with_own_options(values)
    unsupported = {**unsupported, **FORMER_FIELDS, **LATER_FIELDS}
    for name, default in unsupported.items():
        if _is_used(name, values) and values[name] != default:
            raise ValueError(
                f"{name}={_short(values[name])} is not supported: it is a setting of PEFT that "
                f"lora_init does not have, and must be {default!r}"
            )
    chosen = {
        name: value
        for name, value in values.items()
        if name in known and (value is not None or name in ("r", "lora_alpha"))
    }
    understood = {*known, *unsupported, *FILE_ONLY}
    _warn_of_unknown([name for name in values if name not in understood], values, known)
    method = chosen.get("init_lora_weights", True)
    for name in METHODS_OF_CONFIGS:
        if method_of(method) != name:
            chosen.pop(f"{name}_config", None)  # options of another method
    emptied = "layers_pattern", "layers_to_transform", "exclude_modules", "modules_to_save"
    for name in (*emptied, "target_parameters"):
        if name in chosen and _is_empty(chosen[name]) and not _is_whole(chosen[name]):
            del chosen[name]
    if "layers_to_transform" not in chosen:
        chosen.pop("layers_pattern", None)
    for name, value in chosen.items():
        chosen[name] = _checked(name, value)
    for name, defaults in nested.items():
        if isinstance(options := chosen.get(name), dict):
            chosen[name] = _without_defaults(options, defaults, name)
    return chosen


def method_of(init_lora_weights: Any) -> Any:
    """The lower-case method name in a value of init_lora_weights; other values as they are."""
    if isinstance(init_lora_weights, Mapping):
        init_lora_weights = init_lora_weights.get("name")
    return init_lora_weights.lower() if isinstance(init_lora_weights, str) else init_lora_weights


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (not isinstance(value, bool) and not value)


def _is_used(name: str, values: Mapping[str, Any]) -> bool:
    """Whether an unsupported setting has an effect."""
    if name not in values or _is_empty(values[name]) or name == "merge_weights":
        return False
    if name in SWITCHES:
        return False  # its switch is refused if it is on
    if name.endswith("_config") and name.removesuffix("_config") in METHODS_OF_CONFIGS:
        return method_of(values.get("init_lora_weights", True)) == name.removesuffix("_config")
    if name == "ensure_weight_tying":  # has an effect only if embeddings are trained
        targets = values.get("target_modules")
        plain = isinstance(targets, list) and not {"embed_tokens", "lm_head"} & {
            str(target).rpartition(".")[2] for target in targets
        }
        return not (plain and _is_empty(values.get("modules_to_save")))
    return True


def _warn_of_unknown(names: list[str], values: Mapping[str, Any], known: Collection[str]) -> None:
    used = [name for name in names if not _is_empty(values[name])]
    if not used:
        return
    near = {name: difflib.get_close_matches(str(name), known, n=1) for name in used}
    listed = ", ".join(
        f"{name!r}" + (f" (did you mean {near[name][0]!r}?)" if near[name] else "")
        for name in sorted(used, key=str)
    )
    warnings.warn(
        f"unknown fields in the adapter configuration are ignored: {listed}. A later version of "
        "PEFT, or another tool, wrote them.",
        stacklevel=4,
    )


def _without_defaults(
    values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    left = dict(values)
    for name, default in defaults.items():
        if name in left and left.pop(name) != default:
            raise ValueError(
                f"{prefix}.{name} is a setting of PEFT that is not supported: must be {default!r}"
            )
    return left


# -- types -----------------------------------------------------------------------------------------


def _checked(name: str, value: Any) -> Any:
    """Convert a value to the JSON type of its setting; 8.0 counts as a whole number.

    Raises:
        ValueError: the value has another type.
    """
    if name not in _TYPES:
        return value
    accepts, wanted = _TYPES[name]
    if name == "r":
        value = _whole(value)
    elif name == "rank_pattern" and isinstance(value, dict):
        value = {key: _whole(rank) for key, rank in value.items()}
    elif isinstance(value, set | frozenset | tuple):
        value = sorted(value) if all(isinstance(item, str) for item in value) else list(value)
    if not accepts(value):
        raise ValueError(f"{name}={_short(value)} is not supported: must be {wanted}")
    return value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _numbers(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and accepts(item) for key, item in value.items()
    )


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 80 else text[:77] + "..."


_BOOLEAN = (lambda value: isinstance(value, bool), "true or false")
_TEXT = (lambda value: isinstance(value, str), "text")
_TARGETS = (
    lambda value: isinstance(value, str) or _is_names(value),
    "a list of names or a regular expression",
)
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_whole, "a whole number"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (_is_number, "a finite number"),
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "target_parameters": _TARGETS,
    "layers_pattern": _TARGETS,
    "modules_to_save": (_is_names, "a list of names"),
    "layers_to_transform": (
        lambda value: _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value))),
        "a whole number or a list of them",
    ),
    "rank_pattern": (lambda value: _numbers(value, _is_whole), "names with whole numbers"),
    "alpha_pattern": (lambda value: _numbers(value, _is_number), "names with finite numbers"),
    "init_lora_weights": (
        lambda value: isinstance(value, bool | str | dict),
        "true, false, or a method",
    ),
    "fan_in_fan_out": _BOOLEAN,
    "use_rslora": _BOOLEAN,
    "use_dora": _BOOLEAN,
    "lora_bias": _BOOLEAN,
    "inference_mode": _BOOLEAN,
    "bias": _TEXT,
    "task_type": _TEXT,
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
}
