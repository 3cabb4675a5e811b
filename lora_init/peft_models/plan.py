"""PEFT's configuration and layers -> our plan, and every refusal that PEFT's layers make necessary.

Nothing is changed here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_init.adapters.format import peft_computes
from lora_init.config.lora_config import LoraConfig
from lora_init.injection.replace import module_paths
from lora_init.peft_models.apply import check_subtraction
from lora_init.peft_models.changes import Journal
from lora_init.peft_models.layers import AdaptedLayer, adapted_layers, plain_base, saved_modules
from lora_init.peft_models.start import Start, base_owner, records
from lora_init.plan.make import make_plan
from lora_init.plan.match import exactly
from lora_init.plan.plan import Plan
from lora_init.registry import get_initializer

# What PEFT itself subtracts from the base, or replaces it by, when it makes a layer.
CHANGED_BY_PEFT = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Starts of PEFT at which one factor is zero: it is not if the adapter was trained or loaded.
ZERO_AT_START = (True, "gaussian", "eva")


def method_setting(method: Any, options: Any) -> Any:
    """The value of `init_lora_weights` that the two arguments mean.

    Raises:
        TypeError: options that go with no name, or of another method.
    """
    if options is None:
        return method
    if not isinstance(method, str):
        raise TypeError(
            f"options={options!r} with method={method!r}; options go with a method's name"
        )
    if isinstance(options, Mapping):
        return {"name": method, **options}
    wanted = get_initializer(method).options
    if not isinstance(options, wanted):
        raise TypeError(
            f"options={options!r} for method={method!r}; pass a mapping or {wanted.__name__}"
        )
    return {"name": method, **dataclasses.asdict(options)}


def settings(
    peft_model: nn.Module, layers: Sequence[AdaptedLayer], init_lora_weights: Any
) -> LoraConfig:
    """Our configuration of what PEFT has injected: its layers by name, with their own figures."""
    adapter = layers[0].adapter
    theirs = peft_model.peft_config[adapter]
    return LoraConfig(
        r=theirs.r,
        lora_alpha=theirs.lora_alpha,
        target_modules=exactly(layer.name for layer in layers),
        lora_dropout=theirs.lora_dropout,
        bias=theirs.bias,
        use_rslora=theirs.use_rslora,
        modules_to_save=saved_modules(peft_model, adapter) or None,
        init_lora_weights=init_lora_weights,
        rank_pattern={
            f"^{re.escape(layer.name)}": layer.rank for layer in layers if layer.rank != theirs.r
        },
        alpha_pattern={
            f"^{re.escape(layer.name)}": layer.alpha
            for layer in layers
            if layer.alpha != theirs.lora_alpha
        },
        use_dora=theirs.use_dora,
        lora_bias=theirs.lora_bias,
        task_type=getattr(theirs.task_type, "value", theirs.task_type),
        base_model_name_or_path=theirs.base_model_name_or_path,
    )


def plan_for(
    peft_model: nn.Module,
    layers: Sequence[AdaptedLayer],
    config: LoraConfig,
    quantized_base: str,
    wrappers: Journal,
) -> Plan:
    """The plan of an initialization, all checks passed that need no data.

    Raises:
        ValueError, TypeError: as of `lora_init.get_peft_model`; and what PEFT's layers cannot hold.
    """
    spec, _ = config.initializer()
    with plain_base(peft_model, wrappers) as base:
        plan = make_plan(base, config, adapter_dtype(layers), quantized_base=quantized_base)
        _refuse_other_adapters(peft_model, layers, plan)
        _refuse_tied_factors(layers)
        if spec.base != "keep":
            _refuse_shared(base, layers, plan)
            _refuse_other_geometry(layers, plan)
        for layer, target in zip(layers, plan.targets, strict=True):
            check_subtraction(layer, target, plan)
    return plan


def refuse_strange_start(peft_model: nn.Module, adapter_name: str) -> None:
    """Refuse a base that was changed for another PEFT model, or an adapter exchanged since.

    Raises:
        ValueError: a module holds the start of no adapter of this model.
    """
    known = {
        id(start)
        for name in records(peft_model)
        for layer in adapted_layers(peft_model, name, checked=False)
        if (start := layer.start) is not None
    }
    for name, module in peft_model.base_model.model.named_modules():
        if isinstance(module, Start) and id(module) not in known:
            raise ValueError(
                f"adapter {adapter_name!r}: {name.rpartition('.')[0]!r} was started already, for "
                "another PEFT model or for an adapter that is gone. Restore it there "
                "(restore_peft_model, or peft_model.unload()), or load the base model again"
            )


def adapter_dtype(layers: Sequence[AdaptedLayer]) -> torch.dtype:
    """The dtype of the adapter's factors.

    Raises:
        TypeError: there are several.
    """
    found = {layer.factor(which).dtype: layer.name for layer in layers
             for which in ("lora_A", "lora_B")}  # fmt: skip
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise TypeError(
            f"the factors of {first!r} are {one}, those of {second!r} {other}; cast the adapter to "
            "one dtype (PEFT does unless autocast_adapter_dtype=False)"
        )
    return next(iter(found))


def refuse_started(peft_model: nn.Module, layers: Sequence[AdaptedLayer]) -> None:
    """Refuse an adapter that is trained or loaded, or whose base PEFT has changed.

    An optimizer cannot be seen from here; what its steps leave behind can: gradients, and factors
    that are not those of the start.

    Raises:
        ValueError: by the first layer's name.
    """
    adapter = layers[0].adapter
    method = peft_model.peft_config[adapter].init_lora_weights
    if isinstance(method, str) and method.startswith(CHANGED_BY_PEFT):
        raise ValueError(
            f"adapter {adapter!r} has init_lora_weights={method!r}, for which PEFT has changed the "
            "base already; create the PEFT model with init_lora_weights=True"
        )
    for layer in layers:
        if any(parameter.grad is not None for parameter in layer.parameters()):
            raise ValueError(
                f"adapter {adapter!r} has gradients, in {layer.name!r}: training has begun. "
                "Initialize right after peft.get_peft_model, before the optimizer is built (or "
                "clear them: model.zero_grad())"
            )
        start = layer.start
        if start is not None:
            fresh = all(
                torch.equal(layer.matrix(which), initial.to(layer.factor(which).dtype))
                for which, initial in zip(("lora_A", "lora_B"), start.factors(), strict=True)
            )
            fix = "restore_peft_model(peft_model) gives it up"
        else:
            zero = "lora_A" if layer.is_embedding else "lora_B"
            fresh = method not in ZERO_AT_START or not bool(layer.matrix(zero).any())
            fix = "delete_adapter and add_adapter make a fresh one"
        if not fresh:
            raise ValueError(
                f"adapter {adapter!r} is trained or loaded already: the factors of {layer.name!r} "
                f"are not those it started with, and initializing would overwrite them; {fix}"
            )


def _refuse_other_adapters(
    peft_model: nn.Module, layers: Sequence[AdaptedLayer], plan: Plan
) -> None:
    spec, adapter = plan.initializer, layers[0].adapter
    owner = base_owner(peft_model)
    if owner not in (None, adapter):
        raise ValueError(
            f"adapter {adapter!r}: {records(peft_model)[owner].plan.initializer.name} of adapter "
            f"{owner!r} has changed the base; call restore_peft_model(peft_model, {owner!r}) first"
        )
    for layer in layers:
        if layer.others and (spec.base != "keep" or spec.allocates):
            what = "changes the base" if spec.base != "keep" else "moves ranks between layers"
            raise ValueError(
                f"{layer.name!r} holds the adapter {layer.others[0]!r} too, and {spec.name} {what}:"
                " that is served for one adapter a model; add the others afterwards"
            )


def _refuse_tied_factors(layers: Sequence[AdaptedLayer]) -> None:
    """PEFT's `ensure_weight_tying` gives two layers one pair of factors; no start knows of that."""
    owners: dict[int, str] = {}
    for layer in layers:
        for which in ("lora_A", "lora_B"):
            owner = owners.setdefault(layer.factor(which).data_ptr(), layer.name)
            if owner != layer.name:
                raise ValueError(
                    f"{owner!r} and {layer.name!r} share their factors; create the PEFT model with "
                    "ensure_weight_tying=False"
                )


def _refuse_shared(base: nn.Module, layers: Sequence[AdaptedLayer], plan: Plan) -> None:
    paths = module_paths(base)
    for layer, target in zip(layers, plan.targets, strict=True):
        # A subtracting method leaves a tied weight alone, but not a module that hangs twice.
        elsewhere = [] if plan.initializer.base == "subtract" else list(target.shared_with)
        if len(paths[id(layer.base)]) > len(layer.places):
            elsewhere += [path for path in paths[id(layer.base)] if path != layer.name]
        if elsewhere:
            raise ValueError(
                f"target {layer.name!r} shares its weight with {elsewhere[0]!r}, and "
                f"{plan.initializer.name} changes it. Leave it out (exclude_modules), untie them "
                "(tie_word_embeddings=False), or use lora_init.get_peft_model"
            )


def _refuse_other_geometry(layers: Sequence[AdaptedLayer], plan: Plan) -> None:
    for layer in layers:
        if not peft_computes(layer.base):
            raise TypeError(
                f"target {layer.name!r} is a Conv2d with dilation={layer.base.dilation}, "
                f"padding_mode={layer.base.padding_mode!r}; PEFT's lora_A has neither, so it "
                f"cannot stand for a part of the weight, as {plan.initializer.name} needs; leave "
                "it out (exclude_modules), or use lora_init.get_peft_model"
            )
