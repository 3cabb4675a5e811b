"""Merge the adapters into the base weights, and unmerge them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial

import torch

from lora_init import linalg
from lora_init.injection.record import Injection
from lora_init.injection.switch import exchange, set_adapter_enabled
from lora_init.injection.transaction import Transaction, atomically
from lora_init.weights.kinds import known_format


def set_merged(injection: Injection, merged: bool, transaction: Transaction) -> None:
    """Merge the adapters into the base weights, or unmerge them exactly.

    While merged, the injection keeps a copy of the unmerged weights, which costs their memory.

    Raises:
        ValueError: a packed weight cannot be written, or a layer has a `lora_bias` and its base
            has no bias to merge it into. Nothing has changed then.
    """
    if merged == injection.merged:
        return
    if merged:
        _refuse_read_only(injection)
        _refuse_lone_bias(injection)
    transaction.attributes(injection, "unmerged", "untied")
    if merged:
        set_adapter_enabled(injection, True, transaction)
        errors = {}
        for name, layer in injection.layers.items():
            bias = None if layer.lora_bias is None else layer.base_layer.bias.data
            held = known_format(layer.base_layer).hold(layer.base_layer, layer.matrix)
            injection.unmerged[name] = held, bias
            _fold(name, injection, errors, transaction)
        _warn_of_merging(injection, errors, stacklevel=5)
        return
    for name, (held, bias) in injection.unmerged.items():
        layer = injection.layers[name]
        transaction.weight(layer.base_layer, layer.matrix)
        transaction.attributes(layer, "merged")
        known_format(layer.base_layer).put_back(layer.base_layer, held)
        if bias is not None:
            transaction.data(layer.base_layer.bias)
            exchange(layer.base_layer.bias, bias)  # moves to the bias's present device
        layer.merged = False
    injection.unmerged = {}


def fold(injection: Injection) -> None:
    """Merge layer by layer, with the memory of one extra weight.

    Each layer is merged completely or not at all. Layers that an earlier, failed call has merged
    are skipped.
    """
    _refuse_read_only(injection)
    _refuse_lone_bias(injection)
    atomically(partial(set_adapter_enabled, injection, True))
    errors = {}
    for name, layer in injection.layers.items():
        if not layer.merged:
            atomically(partial(_fold, name, injection, errors))
    _warn_of_merging(injection, errors, stacklevel=4)


@torch.inference_mode(False)  # a weight made in inference mode could not be trained
def _fold(
    name: str, injection: Injection, errors: dict[str, float], transaction: Transaction
) -> None:
    """Merge one layer; record the quantization error of a packed one."""
    layer = injection.layers[name]
    module = layer.base_layer
    one, weight = known_format(module), layer.merged_weight()
    transaction.weight(module, layer.matrix)
    transaction.attributes(layer, "merged")
    if name in injection.shared:
        kept = injection.originals.get(name)
        transaction.attributes(injection, "untied")
        injection.untied[name] = layer.stored_weight if kept is None else kept.parameter
    one.write(module, weight, layer.matrix, own=name in injection.shared)
    if layer.lora_bias is not None:
        transaction.data(module.bias)
        bias = module.bias.data
        module.bias.data = (bias + layer.scaling * layer.lora_bias.detach()).to(bias.dtype)
    layer.merged = True
    if one.quantized:
        norm = linalg.frobenius_norm(weight)
        error = linalg.frobenius_norm(weight - one.read(module))
        errors[name] = float(error / norm) if norm > 0 else 0.0


def _refuse_read_only(injection: Injection) -> None:
    for name, layer in injection.layers.items():
        one = known_format(layer.base_layer)
        if (reason := one.unwritable(layer.base_layer)) is not None:
            raise ValueError(
                f"merging is not supported for layer {name!r}, a {one.name} "
                f"({one.describe(layer.base_layer)}): {reason}. Keep the adapter unmerged, or save "
                "it and merge it into the unquantized model"
            )


def _refuse_lone_bias(injection: Injection) -> None:
    for name, layer in injection.layers.items():
        if layer.lora_bias is not None and layer.base_layer.bias is None:
            raise ValueError(
                f"layer {name!r} has a lora_bias, but its base module has no bias to merge it "
                "into; keep the adapter unmerged, or train without lora_bias"
            )


def _warn_of_merging(injection: Injection, errors: Mapping[str, float], stacklevel: int) -> None:
    if errors:
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        warnings.warn(
            f"merged into {len(errors)} quantized weights, which adds a relative error of "
            f"{mean:.1e} on average and {errors[worst]:.1e} in {worst!r}; merge into the "
            "unquantized model to avoid it",
            stacklevel=stacklevel,
        )
    if injection.inexact:
        names = sorted(injection.inexact)
        warnings.warn(
            f"merged into {len(names)} weights that a quantizer's forward rounds again, or whose "
            f"module has forward hooks, the first is {names[0]!r}. The output can change: merge "
            "into the unquantized model, and remove hooks that change inputs or outputs",
            stacklevel=stacklevel,
        )
    for name in sorted(injection.shared):
        warnings.warn(
            f"{name!r} shared its weight with another module and now has a separate one; untie "
            "them in the model's configuration (tie_word_embeddings=False) before saving it",
            stacklevel=stacklevel,
        )
