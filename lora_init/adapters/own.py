"""Our own files: what the header says restores rank r, A0, B0 and the base, trainable as before."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_init.adapters.contents import Contents
from lora_init.adapters.loaded import LoadedAdapter
from lora_init.base_weights import BaseWeights
from lora_init.config import LoraConfig
from lora_init.factors import Replacement
from lora_init.fingerprint import has_fingerprint
from lora_init.packed import is_packed, quantizer_of
from lora_init.plan import Plan, Target
from lora_init.quantization import Quantizer

FORMAT_VERSION = 1


def read_own(contents: Contents, weights: BaseWeights, header: Mapping[str, Any]) -> LoadedAdapter:
    """Check a file with our header against the base."""
    if header.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"the adapter was written in format {header.get('format_version')!r}; this version of "
            f"lora_init reads format {FORMAT_VERSION}"
        )
    config = LoraConfig.from_dict(header["config"])
    config.init_lora_weights = header["method"]
    config.eva_config, config.corda_config, config.loftq_config = None, None, {}
    plan = contents.plan(config, header.get("quantized_base", "in_forward"))
    quantizers = header.get("quantizers", {})
    weights = _originals(weights, plan, header)
    weights.check_unloaded(plan.targets)
    doubled = 2 if plan.initializer.base == "subtract" and not quantizers else 1
    parts = contents.parts(plan, doubled)
    factors = {}
    for target in plan.targets:
        mine, r = parts[target.name], target.rank
        lora_A, lora_B, replacement = mine["lora_A"], mine["lora_B"], None
        if doubled == 2:
            mine["lora_A"], mine["lora_B"] = lora_A[:r], lora_B[:, :r]
            lora_A, lora_B = lora_A[r:].contiguous(), -lora_B[:, r:].contiguous()
        elif target.name in quantizers:
            replacement = Replacement(
                Quantizer.from_dict(quantizers[target.name]),
                contents.part(target, "replacement_A", r),
                contents.part(target, "replacement_B", r),
            )
            _check_quantizer(target, contents.base.get_submodule(target.name), replacement)
        elif plan.initializer.base == "subtract":
            lora_A = contents.part(target, "initial_A", r)
            lora_B = contents.part(target, "initial_B", r)
        factors[target.name] = contents.factors(target, lora_A, lora_B, replacement)
    modules = contents.trained_modules(plan)
    biases = contents.biases(plan)
    contents.refuse_surplus()
    _compare_base(weights, plan, header.get("fingerprints", {}), quantizers)
    checksums = header.get("checksums", {})
    return LoadedAdapter(config, plan, weights, factors, parts, modules, biases, checksums)


def _originals(weights: BaseWeights, plan: Plan, header: Mapping[str, Any]) -> BaseWeights:
    """What the replaced bases were computed from, checked while nothing has been changed.

    Raises:
        ValueError: they need the unquantised checkpoint and there is none, or another one.
    """
    needed = header.get("from_original_weights")
    if not needed:
        # A quantised base's own values were what was requantised: a checkpoint would give another.
        quantized = any(target.quantized for target in plan.targets)
        return BaseWeights(weights.model, None) if quantized else weights
    if weights.originals is None:
        raise ValueError(
            f"the base of {next(iter(needed))!r} was quantised anew from the unquantised "
            "checkpoint; pass original_weights=<its folder>"
        )
    weights.check(plan.targets)
    for target in plan.targets:
        expected = needed.get(target.name)
        if expected is not None and not has_fingerprint(weights.weight(target), expected):
            raise ValueError(
                f"original_weights: the weight of {target.name!r} is not the one that the "
                "adapter's base was quantised from; pass that checkpoint"
            )
    return weights


def _check_quantizer(target: Target, module: nn.Module, replacement: Replacement) -> None:
    if is_packed(module) and quantizer_of(module) != replacement.quantizer:
        raise ValueError(
            f"the base of {target.name!r} is quantised as {quantizer_of(module).name}, the adapter "
            f"was trained on {replacement.quantizer.name}; load the model with the "
            "quantization_config of the training"
        )


def _compare_base(
    weights: BaseWeights, plan: Plan, fingerprints: Mapping[str, str], quantizers: Mapping[str, Any]
) -> None:
    for target in plan.targets:
        expected = fingerprints.get(target.name)
        if expected is None or has_fingerprint(weights.present(target), expected):
            continue
        message = (
            f"the base weight of {target.name!r} is not the one the adapter was trained on; load "
            "the original base model"
        )
        if quantizers:
            raise ValueError(message + " (its quantised base is rebuilt from these weights)")
        warnings.warn(message, stacklevel=5)
        return
