"""Factors -> model, and back. The only code that changes a model."""

from lora_init.injection.injecting import (
    forget_originals,
    inject,
    merge,
    refuse_adapted,
    reinstate,
    restore,
)
from lora_init.injection.merging import set_merged
from lora_init.injection.plain import hold_plain, release
from lora_init.injection.settling import move_initial_factors
from lora_init.injection.state import Injection
from lora_init.injection.switching import set_adapter_enabled

__all__ = [
    "Injection",
    "forget_originals",
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
