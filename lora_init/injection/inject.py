"""Inject the factors of a plan into a model, restore the model, or reinstate the adapter.

Settings and values have been checked before. If a later failure occurs (out of memory, an
interrupt), the transaction undoes the changes made so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.factors import Factors, output_factor
from lora_init.injection.base import settle_base, settle_magnitude
from lora_init.injection.editing import add_product
from lora_init.injection.merge import set_merged
from lora_init.injection.record import Injection
from lora_init.injection.repacking import hold_plain, release
from lora_init.injection.replace import replace_modules
from lora_init.injection.shards import shard_adapter
from lora_init.injection.switch import set_adapter_enabled
from lora_init.injection.transaction import Transaction, set_gradient_flags
from lora_init.layers import (
    LoraExperts,
    LoraLayer,
    TrainedModule,
    layer_class,
    trainable_copy,
)
from lora_init.layers.attention import attentions
from lora_init.linalg.precision import full_precision
from lora_init.plan.plan import Plan, Target
from lora_init.weights.format import Held
from lora_init.weights.offload import factor_device, is_unloaded
from lora_init.weights.source import BaseWeights


@torch.inference_mode(False)
def inject_factors(
    model: nn.Module,
    plan: Plan,
    factors: Mapping[str, Factors],
    *,
    transaction: Transaction,
    weights: BaseWeights,
    plain: Mapping[nn.Module, Held],
    keep_original: bool = False,
    initial_known: bool = True,
) -> Injection:
    """Wrap the plan's targets, edit or replace their base weights, and freeze all other parameters.

    Args:
        model: modified in place.
        plan: the targets, the modules to save, and the biases to train.
        factors: by target name; checked, on the right device and in the adapter's dtype.
        transaction: undoes all changes if this or a later step fails.
        weights: provides weights that are not in memory, and those that replaced bases come from.
        plain: the result of `hold_plain` for the model's packed modules.
        keep_original: keep the originals of replaced bases. Float weights move to CPU memory.
        initial_known: whether the factors are those of step 0. False for a trained adapter that is
            loaded onto a kept base.
    """
    injection = _prepare(model, plan, factors, weights, initial_known)
    injection.plain = dict(plain)
    transaction.gradient_flags(parameter for parameter, _ in injection.requires_grad)
    for parameter, _ in injection.requires_grad:
        parameter.requires_grad_(False)
    for target in plan.targets:
        layer = injection.layers[target.name]
        settle_base(
            layer, target, plan, factors[target.name], injection, weights, keep_original,
            transaction,
        )  # fmt: skip
        if layer.use_dora:
            settle_magnitude(layer, target, injection, weights)
        shard_adapter(model, target.name, layer)
    for name in plan.trained_biases:
        bias = model.get_parameter(name)
        injection.biases[name] = (bias, bias.detach().clone())
        module, _, own_name = name.rpartition(".")
        transaction.values(model.get_submodule(module), own_name)
        bias.requires_grad_(True)
    _place(model, injection, transaction)
    _forget_lost(model, injection)
    return injection


def _normal(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def forget_originals(model: nn.Module, injection: Injection) -> None:
    """Free the originals of replaced bases."""
    injection.originals.clear()
    _forget_lost(model, injection)


def _forget_lost(model: nn.Module, injection: Injection) -> None:
    """Free packed originals that are not kept."""
    lost = injection.lost()
    for name in lost:
        injection.plain.pop(injection.layers[name].base_layer, None)
    if lost:
        present = {id(parameter) for parameter in model.parameters()}
        flags = [(p, flag) for p, flag in injection.requires_grad if id(p) in present]
        injection.requires_grad = flags


def _prepare(
    model: nn.Module,
    plan: Plan,
    factors: Mapping[str, Factors],
    weights: BaseWeights,
    initial_known: bool,
) -> Injection:
    """Do everything that allocates memory or may fail, without changing the model."""
    modules = {target.name: model.get_submodule(target.module) for target in plan.targets}
    unloaded = any(is_unloaded(modules[target.name], target.matrix) for target in plan.targets)
    injection = Injection(
        # A checkpoint passed as a mapping occupies memory: hold it only if it is needed.
        weights if unloaded else BaseWeights(model, None),
        requires_grad=[(p, p.requires_grad) for p in model.parameters()],
        shared=frozenset(target.name for target in plan.targets if target.shared_with),
        inexact=frozenset(target.name for target in plan.targets if not target.exact),
    )
    for target in plan.targets:
        module = modules[target.name]
        # Factors loaded in inference mode cannot be part of a graph: clone them.
        lora_A, lora_B = map(_normal, (factors[target.name].lora_A, factors[target.name].lora_B))
        core = factors[target.name].core
        core = None if core is None else _normal(core)
        with full_precision():
            start = output_factor(lora_B, core)
        layer = layer_class(module)(
            module,
            lora_A.clone(),
            lora_B.clone(),
            scaling=target.scaling,
            dropout=plan.dropout,
            initial=(lora_A, start.detach()) if initial_known else None,
            use_dora=plan.use_dora,
            lora_bias=plan.lora_bias,
            core=None if core is None else core.clone(),
            **_place_in_module(target),
        )
        for frozen in plan.initializer.frozen:
            getattr(layer, frozen).requires_grad_(False)
        injection.layers[target.name] = layer
        if weights.is_readable(target):
            injection.fingerprints[target.name] = weights.fingerprint(target)
    for name in dict.fromkeys(t.module for t in plan.targets if t.experts is not None):
        own: dict[str, Any] = {
            t.matrix: injection.layers[t.name] for t in plan.targets if t.module == name
        }
        injection.routed[name] = LoraExperts(modules[f"{name}.{next(iter(own))}"], own)
    for name in plan.modules_to_save:
        original = model.get_submodule(name)
        trained = trainable_copy(original, plan.adapter_dtype)
        injection.trained[name] = TrainedModule(original, trained)
    return injection


def _place_in_module(target: Target) -> dict[str, Any]:
    """The keyword that names the adapted matrix, for layers of modules with several."""
    return {} if target.experts is None else {"matrix": target.matrix}


@torch.inference_mode(False)
def restore(model: nn.Module, injection: Injection, transaction: Transaction) -> None:
    """Restore the model: modules, weights, biases and requires_grad flags.

    Raises:
        RuntimeError: a base was replaced and its original was not kept. Nothing has changed then.
    """
    injection.refuse_lost("unload")
    set_merged(injection, False, transaction)
    set_adapter_enabled(injection, False, transaction)
    for layer in injection.layers.values():
        if layer.base_state == "edited":
            start = layer.initial_lora_A, layer.initial_lora_B
            add_product(layer.base_layer, *start, layer.scaling, 1, transaction)
    release(injection.plain, transaction)
    _unwrap(model, injection, lambda trained: trained.original_module, transaction)
    injection.attentions = attentions(model)
    replace_modules(model, ((one, one.joined()) for one in injection.attentions), transaction)


@torch.inference_mode(False)
def reinstate(model: nn.Module, injection: Injection, transaction: Transaction) -> None:
    """Invert `restore`: put the same trained adapter back into the model."""
    transaction.gradient_flags(parameter for parameter, _ in injection.requires_grad)
    transaction.gradient_flags(bias for bias, _ in injection.biases.values())
    transaction.attributes(injection, "plain")
    for parameter, _ in injection.requires_grad:
        parameter.requires_grad_(False)
    _follow(injection)
    pairs = ((one.joined(), one) for one in injection.attentions)
    replace_modules(model, pairs, transaction)
    injection.plain = hold_plain(model, transaction)
    for layer in injection.layers.values():
        if layer.base_state == "edited":
            start = layer.initial_lora_A, layer.initial_lora_B
            add_product(layer.base_layer, *start, layer.scaling, -1, transaction)
    for bias, _ in injection.biases.values():
        bias.requires_grad_(True)
    _place(model, injection, transaction)
    set_adapter_enabled(injection, True, transaction)


def _follow(injection: Injection) -> None:
    """Move a detached adapter to the present device of its base layers."""
    for layer in injection.layers.values():
        move = partial(Tensor.to, device=factor_device(layer.base_layer, layer.matrix))
        layer._apply(move, recurse=False)
    for trained in injection.trained.values():
        home = next(trained.original_module.parameters(), None)
        if home is not None:
            trained.trained_module.to(home.device)


def unwrap_merged(model: nn.Module, injection: Injection, transaction: Transaction) -> None:
    """Replace adapted layers by their merged base layers, and saved modules by trained ones."""
    merged = {layer.base_layer for layer in injection.layers.values()}
    left = {module: held for module, held in injection.plain.items() if module not in merged}
    release(left, transaction)
    flags = {id(parameter): flag for parameter, flag in injection.requires_grad}
    for trained in injection.trained.values():
        for tensor in (*trained.trained_module.parameters(), *trained.trained_module.buffers()):
            transaction.data(tensor)
    _unwrap(model, injection, TrainedModule.merged_module, transaction)
    replace_modules(model, ((one, one.joined()) for one in attentions(model)), transaction)
    for name, parameter in injection.untied.items():
        weight = injection.layers[name].stored_weight
        transaction.gradient_flags([weight])
        weight.requires_grad_(flags[id(parameter)])


def refuse_adapted(model: nn.Module) -> None:
    """Raise if the model has an adapter already, from this library or from PEFT.

    Raises:
        ValueError: only one adapter per model is supported.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer | LoraExperts | TrainedModule):
            raise ValueError(
                f"{name!r} has an adapter already, and only one adapter per model is supported; "
                "call unload() or merge_and_unload() on the LoraModel that holds it first, or its "
                "reinitialize() to start it another way"
            )
        if type(module).__module__.startswith("peft."):
            raise ValueError(
                f"{name or 'the model'!r} was injected by PEFT; pass the plain base model "
                "(PEFT's model.unload() returns it)"
            )
        if type(module).__module__.startswith("lora_init.peft_models."):
            raise ValueError(
                f"{name.rpartition('.')[0]!r} was initialized by initialize_peft_model already, "
                "and its weight or output is not the original one. Call unload() on that PEFT "
                "model, or load the base model again"
            )


def _place(model: nn.Module, injection: Injection, transaction: Transaction) -> None:
    wrappers, trained = injection.wrappers, injection.trained.values()
    replace_modules(model, ((one.base_layer, one) for one in wrappers), transaction)
    replace_modules(model, ((one.original_module, one) for one in trained), transaction)


def _unwrap(
    model: nn.Module,
    injection: Injection,
    pick: Callable[[TrainedModule], nn.Module],
    transaction: Transaction,
) -> None:
    wrappers, trained = injection.wrappers, injection.trained.values()
    replace_modules(model, ((one, one.base_layer) for one in wrappers), transaction)
    replace_modules(model, ((one, pick(one)) for one in trained), transaction)
    transaction.gradient_flags(parameter for parameter, _ in injection.requires_grad)
    set_gradient_flags(injection.requires_grad)
