"""Enable and disable an adapter. A disabled adapter leaves the model's original function."""

from __future__ import annotations

import torch

from lora_init.injection.record import Injection
from lora_init.injection.transaction import Transaction
from lora_init.injection.weights import exchange, hold, put_back


@torch.inference_mode(False)
def set_adapter_enabled(injection: Injection, enabled: bool, transaction: Transaction) -> None:
    """Enable the adapter, or disable it, which restores the model's original function.

    Raises:
        RuntimeError: the adapter cannot be disabled, because it is merged, or because a base was
            replaced and its original was not kept.
    """
    if enabled == injection.enabled:
        return
    if not enabled:
        injection.refuse_lost("disable_adapter")
        if injection.merged:
            raise RuntimeError("the adapter is merged; call unmerge_adapter() first")
    transaction.attributes(injection, "enabled", "originals", "biases")
    for name, held in list(injection.originals.items()):
        module = injection.layers[name].base_layer
        elsewhere = held.data is not None and held.data.device != module.weight.device
        now = hold(module, on_cpu=elsewhere)
        transaction.weight(module)
        put_back(module, held)
        injection.originals[name] = now
    for name, (bias, other) in list(injection.biases.items()):
        transaction.data(bias)
        injection.biases[name] = (bias, exchange(bias, other))
    for part in (*injection.layers.values(), *injection.trained.values()):
        transaction.attributes(part, "adapter_enabled")
        part.adapter_enabled = enabled
    injection.enabled = enabled
