"""The plan of an initialization under PEFT, from PEFT's configuration and layers.

Every refusal that PEFT's layers make necessary is here. Nothing is changed.
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
from lora_init.injection import Transaction
from lora_init.injection.replace import module_paths
from lora_init.peft_models.holder import base_model, plain_base, wrappers
from lora_init.peft_models.layers import AdaptedLayer, adapted_layers
from lora_init.peft_models.start import Start, base_owner, records
from lora_init.peft_models.subtraction import check_subtraction
from lora_init.plan.make import make_plan
from lora_init.plan.match import exactly
from lora_init.plan.plan import Plan
from lora_init.registry import get_initializer
from lora_init.weights.kinds import known_format
from lora_init.weights.sharded import local_part, whole

# The methods of PEFT that subtract from the base, or replace it, when they make a layer.
CHANGED_BY_PEFT = ("pissa", "olora", "corda", "loftq", "lora_ga", "astra")
# The methods of PEFT with one factor of zeros: it is not zero if the adapter was trained or loaded.
ZERO_AT_START = (True, "gaussian", "eva")


def method_setting(method: Any, options: Any) -> Any:
    """The value of `init_lora_weights` that the two arguments mean.

    Raises:
        TypeError: options without a method's name, or of another method.
    """
    if options is None:
        return method
    if not isinstance(method, str):
        raise TypeError(
            f"options={options!r} is not supported with method={method!r}: options go with a "
            "method's name"
        )
    if isinstance(options, Mapping):
        return {"name": method, **options}
    wanted = get_initializer(method).options
    if not isinstance(options, wanted):
        raise TypeError(
            f"options={options!r} is not supported for method={method!r}: must be a mapping or "
            f"{wanted.__name__}"
        )
    return {"name": method, **dataclasses.asdict(options)}


def own_config(
    peft_model: Any, layers: Sequence[AdaptedLayer], init_lora_weights: Any
) -> LoraConfig:
    """Our configuration of what PEFT has injected: its layers by name, with their own figures."""
    adapter = layers[0].adapter
    theirs = peft_model.peft_config[adapter]
    saved = [
        name
        for name, place in wrappers(peft_model)
        if adapter in getattr(place.module, "modules_to_save", ())
    ]
    parameters = [layer.name for layer in layers if layer.experts is not None]
    modules = dict.fromkeys(
        layer.attention or layer.name for layer in layers if layer.experts is None
    )
    patterns = {f"^{re.escape(layer.attention or layer.name)}": layer for layer in layers}
    ranks = {key: layer.rank for key, layer in patterns.items()}
    alphas = {key: layer.alpha for key, layer in patterns.items()}
    return LoraConfig(
        r=theirs.r,
        lora_alpha=theirs.lora_alpha,
        target_modules=exactly(modules) if modules else None,
        target_parameters=exactly(parameters) if parameters else None,
        experts=False,
        lora_dropout=theirs.lora_dropout,
        bias=theirs.bias,
        use_rslora=theirs.use_rslora,
        modules_to_save=saved or None,
        init_lora_weights=init_lora_weights,
        rank_pattern={key: rank for key, rank in ranks.items() if rank != theirs.r},
        alpha_pattern={key: alpha for key, alpha in alphas.items() if alpha != theirs.lora_alpha},
        use_dora=theirs.use_dora,
        lora_bias=theirs.lora_bias,
        task_type=getattr(theirs.task_type, "value", theirs.task_type),
        base_model_name_or_path=theirs.base_model_name_or_path,
    )


def make_peft_plan(
    peft_model: nn.Module,
    layers: Sequence[AdaptedLayer],
    config: LoraConfig,
    quantized_base: str,
    calibration_memory: int | None,
    transaction: Transaction,
) -> Plan:
    """The plan of an initialization, after all checks that need no data.

    Raises:
        ValueError, TypeError: as `lora_init.get_peft_model`; and what PEFT's layers cannot hold.
    """
    spec, _ = config.initializer()
    if spec.has_core:
        raise ValueError(
            f"method={spec.name!r} is not supported for a PEFT model: it trains a core between A "
            "and B, which PEFT's layers do not have. Use lora_init.get_peft_model"
        )
    with plain_base(peft_model, transaction) as base:
        plan = make_plan(
            base,
            config,
            adapter_dtype(layers),
            quantized_base=quantized_base,
            calibration_memory=calibration_memory,
        )
        _refuse_other_adapters(peft_model, layers, plan)
        _refuse_tied_factors(layers)
        if plan.initializer.base != "keep":
            _refuse_shared(base, layers, plan)
            _refuse_other_geometry(layers, plan)
        for layer, target in zip(layers, plan.targets, strict=True):
            if (layer.is_parameter or target.attention) and plan.initializer.base == "replace":
                what = "an attention" if target.attention else "a parameter"
                raise ValueError(
                    f"method={spec.name!r} is not supported for {target.name!r} in a PEFT model: "
                    f"it replaces the weights of {what}. Leave it out of the targets, or use "
                    "lora_init.get_peft_model"
                )
            check_subtraction(layer, target, plan)
    return plan


def refuse_foreign_start(peft_model: Any, adapter_name: str) -> None:
    """Refuse a base that was changed for another PEFT model, or an adapter exchanged since.

    Raises:
        ValueError: a module holds the start of no adapter of this model.
    """
    known = {
        id(layer.start)
        for name in records(peft_model)
        for layer in adapted_layers(peft_model, name, checked=False)
    }
    for name, module in base_model(peft_model).named_modules():
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
    found = {
        layer.factor(which).dtype: layer.name for layer in layers for which in ("lora_A", "lora_B")
    }
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise TypeError(
            f"the factors of {first!r} are {one}, those of {second!r} {other}. Cast the adapter to "
            "one dtype (PEFT does unless autocast_adapter_dtype=False)"
        )
    return next(iter(found))


def refuse_trained(peft_model: Any, layers: Sequence[AdaptedLayer]) -> None:
    """Refuse an adapter that is trained or loaded, or whose base PEFT has changed.

    An optimizer cannot be seen from here. Its steps can: they leave gradients, and factors that
    are not those of the start.

    Raises:
        ValueError: by the first layer's name.
    """
    adapter = layers[0].adapter
    method = peft_model.peft_config[adapter].init_lora_weights
    if isinstance(method, str) and method.startswith(CHANGED_BY_PEFT):
        raise ValueError(
            f"adapter {adapter!r} has init_lora_weights={method!r}, for which PEFT has changed the "
            "base already. Create the PEFT model with init_lora_weights=True"
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
                torch.equal(factor, layer.stored(which, initial.to(factor)))
                for which, initial in zip(("lora_A", "lora_B"), start.factors(), strict=True)
                for factor in [whole(layer.factor(which))]
            )
            fix = "restore_peft_model(peft_model) removes it"
        else:
            zero = "lora_A" if layer.is_embedding else "lora_B"
            fresh = method not in ZERO_AT_START or not bool(layer.matrix(zero).any())
            fix = "delete_adapter and add_adapter make a fresh one"
        if not fresh:
            raise ValueError(
                f"adapter {adapter!r} is trained or loaded already: the factors of {layer.name!r} "
                f"are not those it started with, and initializing would overwrite them. {fix}"
            )


def _refuse_other_adapters(peft_model: Any, layers: Sequence[AdaptedLayer], plan: Plan) -> None:
    spec, adapter = plan.initializer, layers[0].adapter
    owner = base_owner(peft_model)
    if owner is not None and owner != adapter:
        raise ValueError(
            f"adapter {adapter!r}: {records(peft_model)[owner].plan.initializer.name} of adapter "
            f"{owner!r} has changed the base. Call restore_peft_model(peft_model, {owner!r}) first"
        )
    for layer in layers:
        if layer.others and (spec.base != "keep" or spec.allocates):
            what = "changes the base" if spec.base != "keep" else "moves ranks between layers"
            raise ValueError(
                f"{layer.name!r} holds the adapter {layer.others[0]!r} too, and {spec.name} {what},"
                " which is supported for one adapter. Add the other adapters afterwards"
            )


def _refuse_tied_factors(layers: Sequence[AdaptedLayer]) -> None:
    """PEFT's `ensure_weight_tying` gives two layers one pair of factors; no method knows that."""
    owners: dict[int, str] = {}
    for layer in layers:
        for which in ("lora_A", "lora_B"):
            factor = layer.factor(which)
            place = local_part(factor.detach()).data_ptr() or id(factor)  # 0 for an empty part
            owner = owners.setdefault(place, layer.name)
            if owner != layer.name:
                raise ValueError(
                    f"{owner!r} and {layer.name!r} share their factors, which is not supported. "
                    "Create the PEFT model with ensure_weight_tying=False"
                )


def _refuse_shared(base: nn.Module, layers: Sequence[AdaptedLayer], plan: Plan) -> None:
    paths = module_paths(base)
    for layer, target in zip(layers, plan.targets, strict=True):
        # A subtracting method does not change a tied weight, but one module in two places is
        # called without its adapter in the other one.
        elsewhere = [] if plan.initializer.base == "subtract" else list(target.shared_with)
        present = paths[id(base.get_submodule(target.module))]
        if len(present) > len(layer.places):
            elsewhere += [path for path in present if path != layer.name]
        if elsewhere:
            raise ValueError(
                f"target {layer.name!r} shares its weight with {elsewhere[0]!r}, and "
                f"{plan.initializer.name} changes it. Leave it out (exclude_modules), untie them "
                "(tie_word_embeddings=False), or use lora_init.get_peft_model"
            )


def _refuse_other_geometry(layers: Sequence[AdaptedLayer], plan: Plan) -> None:
    for layer in layers:
        if layer.attention is None and not peft_computes(layer.base, use_dora=False):
            raise TypeError(
                f"target {layer.name!r} is a {known_format(layer.base).name} with "
                f"dilation={layer.base.dilation}, padding_mode={layer.base.padding_mode!r}, which "
                f"is not supported by {plan.initializer.name}: PEFT's lora_A has neither. Leave "
                "it out (exclude_modules), or use lora_init.get_peft_model"
            )
