"""Accept the unsupported fields of PEFT if their values have no effect."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lora_init.config.json_types import json_value

SWITCHES = {"qalora_group_size": "use_qalora", "megatron_core": "megatron_config"}
"""Fields without effect while another field is off, by the name of that other field."""

RECORDED = ("auto_mapping", "peft_version")
"""Fields that describe how a file was written. They have no effect."""

UNUSED = {"peft_type": "LORA", "runtime_config": {"ephemeral_gpu_offload": False}}
"""Other fields of PEFT's class, with the values that have no effect."""


def accepts_peft_fields(defaults: Mapping[str, Any]) -> Callable[[type], type]:
    """Decorate a configuration class so that it accepts PEFT's other fields as keywords.

    Values with an effect raise a ValueError. The signature of the class does not change.

    Args:
        defaults: the unsupported fields, with PEFT's defaults.
    """

    def decorate(cls: type) -> type:
        initialize = cls.__init__

        @functools.wraps(initialize)
        def __init__(self: Any, *args: Any, **settings: Any) -> None:
            foreign = {name for name in settings if name in {*defaults, *RECORDED, *UNUSED}}
            given = {name: settings.pop(name) for name in foreign}
            _refuse_used(given, {**defaults, **UNUSED})
            initialize(self, *args, **settings)

        cls.__init__ = __init__
        return cls

    return decorate


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
    return isinstance(value, Iterable) and hasattr(value, "__len__") and len(value) == 0
