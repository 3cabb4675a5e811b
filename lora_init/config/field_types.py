"""Check the types of the fields of a `LoraConfig`."""

from __future__ import annotations

from typing import Any

NAMES = ("target_modules", "exclude_modules", "layers_pattern", "target_parameters")
PATTERNS = ("rank_pattern", "alpha_pattern")
STRINGS = ("base_model_name_or_path", "revision")


def check_field_types(config: Any) -> None:
    """Check the type of each field.

    Args:
        config: a `LoraConfig` whose values were converted to JSON types.

    Raises:
        TypeError: a field has a wrong type. The message names the field and the supported types.
    """
    for name in NAMES:
        value = getattr(config, name)
        if not (value is None or isinstance(value, str) or _are(str, value)):
            shorthand = ', "all-linear"' if name == "target_modules" else ""
            raise _wrong(name, value, f"a list of names, one regular expression{shorthand} or None")
    indices = config.layers_to_transform
    if not (indices is None or _are(int, [indices]) or _are(int, indices)):
        raise _wrong("layers_to_transform", indices, "an integer, a list of integers or None")
    if config.modules_to_save is not None and not _are(str, config.modules_to_save):
        raise _wrong("modules_to_save", config.modules_to_save, "a list of names or None")
    for name in PATTERNS:
        if not isinstance(getattr(config, name), dict):
            wanted = "a mapping of names or regular expressions to numbers"
            raise _wrong(name, getattr(config, name), wanted)
    for name in STRINGS:
        if not isinstance(getattr(config, name), str | None):
            raise _wrong(name, getattr(config, name), "a string, a path or None")


def _are(kind: type, values: Any) -> bool:
    """Whether `values` is a list of `kind`. A bool does not count as an int."""
    return isinstance(values, list) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    )


def _wrong(name: str, value: Any, wanted: str) -> TypeError:
    return TypeError(f"{name}={value!r} is not supported: must be {wanted}. Pass one of these.")
