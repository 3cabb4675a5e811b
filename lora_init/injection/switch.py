"""Enable and disable an adapter. A disabled adapter leaves the model's original function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_init.injection.record import Injection
from lora_init.injection.transaction import Transaction
from lora_init.weights.kinds import known_format


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
        layer = injection.layers[name]
        module, matrix = layer.base_layer, layer.matrix
        one = known_format(module)
        on_cpu = held.data.device != layer.stored_weight.device
        now = one.hold(module, matrix, on_cpu=on_cpu)
        transaction.weight(module, matrix)
        one.put_back(module, held)
        injection.originals[name] = now
    for name, (bias, other) in list(injection.biases.items()):
        transaction.data(bias)
        injection.biases[name] = (bias, exchange(bias, other))
    for part in (*injection.layers.values(), *injection.trained.values()):
        transaction.attributes(part, "adapter_enabled")
        part.adapter_enabled = enabled
    injection.enabled = enabled


def exchange(parameter: nn.Parameter, data: Tensor) -> Tensor:
    """Replace a parameter's data; return the old data."""
    with torch.no_grad():
        before = parameter.data
        parameter.data = data.to(before.device, before.dtype)
    return before
