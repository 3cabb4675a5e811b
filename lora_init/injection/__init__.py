"""Factors -> model, and back. The only code that changes a model."""

from lora_init.injection.injecting import (
    forget_originals,
    inject,
    refuse_adapted,
    reinstate,
    restore,
    unwrap_merged,
)
from lora_init.injection.merging import fold, set_merged
from lora_init.injection.plain import hold_plain
from lora_init.injection.settling import move_initial_factors
from lora_init.injection.state import Injection
from lora_init.injection.switching import set_adapter_enabled
from lora_init.injection.transaction import Transaction, atomically

__all__ = [
    "Injection",
    "Transaction",
    "atomically",
    "fold",
    "forget_originals",
    "hold_plain",
    "inject",
    "move_initial_factors",
    "refuse_adapted",
    "reinstate",
    "restore",
    "set_adapter_enabled",
    "set_merged",
    "unwrap_merged",
]
