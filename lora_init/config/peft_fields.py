"""Accept the unsupported fields of PEFT if their values have no effect."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, TypeVar

from lora_init.config.json_types import json_value
from lora_init.registry import method_name

Config = TypeVar("Config")

SWITCHES = {"qalora_group_size": "use_qalora", "megatron_core": "megatron_config"}
"""Fields without effect while another field is off, by the name of that other field."""

RECORDED = ("auto_mapping", "peft_version")
"""Fields that describe how a file was written. They have no effect."""

COVARIANCE_SETTINGS = {
    "cache_file": None,
    "covariance_file": None,
    "verbose": False,
    "use_float16_for_covariance": False,
    "prune_temporary_fields": True,
}
"""PEFT's settings of a covariance file, which are not supported, with the values for "unused"."""

OWN_NAMES: dict[str, dict[str, str]] = {
    "astra": {},
    "lora_ga": {"direction": "direction", "scale": "scale", "stable_gamma": "gamma"},
}
"""Our names of the options in PEFT's `<name>_config`, for methods without a field of this name."""

UNUSED = {
    "peft_type": "LORA",
    "runtime_config": {"ephemeral_gpu_offload": False},
    "astra_config": None,
}
"""Other fields of PEFT's class, with the values that have no effect."""


def accepts_peft_fields(defaults: Mapping[str, Any]) -> Callable[[type[Config]], type[Config]]:
    """Decorate a configuration class so that it accepts PEFT's other fields as keywords.

    Values with an effect raise a ValueError. The signature of the class does not change.

    Args:
        defaults: the unsupported fields, with PEFT's defaults.
    """

    def decorate(cls: type[Config]) -> type[Config]:
        initialize = cls.__init__

        @functools.wraps(initialize)
        def __init__(self: Any, *args: Any, **settings: Any) -> None:
            settings = with_own_options(settings)
            foreign = {name for name in settings if name in {*defaults, *RECORDED, *UNUSED}}
            given = {name: settings.pop(name) for name in foreign}
            _refuse_used(given, {**defaults, **UNUSED})
            initialize(self, *args, **settings)

        cls.__init__ = __init__
        return cls

    return decorate


def with_own_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Move PEFT's `astra_config` or `lora_ga_config` into `init_lora_weights`, if that names it.

    Raises:
        ValueError: an option is not supported. The message names it.
    """
    left, method = dict(settings), settings.get("init_lora_weights")
    name = method_name(method) if isinstance(method, str) else None
    field = f"{name}_config"
    if name not in OWN_NAMES or _is_empty(left.get(field)):
        return left
    given = json_value(field, left.pop(field))
    if not isinstance(given, dict):
        raise ValueError(f"{field}={given!r} is not supported: must be a mapping. Pass a mapping.")
    options: dict[str, Any] = {}
    unused = COVARIANCE_SETTINGS if name == "astra" else {}
    for option, value in given.items():
        if option in OWN_NAMES[name]:
            options[OWN_NAMES[name][option]] = "gd" if value == "gd_scale" else value
        elif value is not None and (option not in unused or value != unused[option]):
            raise ValueError(
                f"{field}.{option}={value!r} is not supported: it is a setting of PEFT that "
                "lora_init does not have. Leave it out."
            )
    left["init_lora_weights"] = {"name": name, **options} if options else name
    return left


def _refuse_used(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for name in sorted(given):
        if name in RECORDED or _is_empty(given[name]):
            continue
        switch = SWITCHES.get(name)
        if switch is not None and _is_empty(given.get(switch)):
            continue
        if json_value(name, given[name]) != defaults[name]:
            raise ValueError(
                f"{name}={given[name]!r} is not supported: it is a setting of PEFT that lora_init "
                f"does not have, and must be {defaults[name]!r}. Leave it out."
            )


def _is_empty(value: Any) -> bool:
    if value is None or value is False:
        return True
    return isinstance(value, Iterable) and isinstance(value, Sized) and len(value) == 0
