"""Factors -> model, and back. The only code that changes a model."""

from lora_init.injection.injecting import (
    Injection,
    inject,
    merge,
    move_initial_factors,
    refuse_adapted,
    reinstate,
    restore,
    set_adapter_enabled,
    set_merged,
)
from lora_init.injection.plain import hold_plain, release

__all__ = [
    "Injection",
    "hold_plain",
    "inject",
    "merge",
    "move_initial_factors",
    "refuse_adapted",
    "reinstate",
    "release",
    "restore",
    "set_adapter_enabled",
    "set_merged",
]
