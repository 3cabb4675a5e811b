"""Put an initialized adapter into a model and take it out again. Only this package edits models."""

from lora_init.injection.base import move_initial_factors
from lora_init.injection.inject import (
    forget_originals,
    inject_factors,
    refuse_adapted,
    reinstate,
    restore,
    unwrap_merged,
)
from lora_init.injection.merge import fold, set_merged
from lora_init.injection.record import Injection
from lora_init.injection.repacking import hold_plain
from lora_init.injection.switch import set_adapter_enabled
from lora_init.injection.transaction import Transaction, atomically

__all__ = [
    "Injection",
    "Transaction",
    "atomically",
    "fold",
    "forget_originals",
    "hold_plain",
    "inject_factors",
    "move_initial_factors",
    "refuse_adapted",
    "reinstate",
    "restore",
    "set_adapter_enabled",
    "set_merged",
    "unwrap_merged",
]
