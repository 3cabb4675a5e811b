"""Injecting a plan's factors, and the ways out: restored, merged, and back in.

What can fail for a reason in the settings or the numbers has been checked before; if the machine
fails in the middle (memory, an interrupt), what was done is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lora_init import packed
from lora_init.base_weights import BaseWeights
from lora_init.factors import Factors
from lora_init.fingerprint import fingerprint
from lora_init.injection.editing import add_product
from lora_init.injection.merging import fold, set_merged
from lora_init.injection.places import replace_modules
from lora_init.injection.plain import hold_plain, release
from lora_init.injection.settling import settle_base, settle_magnitude
from lora_init.injection.state import Injection
from lora_init.injection.switching import set_adapter_enabled
from lora_init.layers import LoraLayer, TrainedModule, layer_class, trainable_copy
from lora_init.plan import Plan
from lora_init.presence import factor_device, is_unloaded


@torch.inference_mode(False)
def inject(
    model: nn.Module,
    plan: Plan,
    factors: Mapping[str, Factors],
    *,
    weights: BaseWeights,
    plain: Mapping[nn.Module, packed.Held],
    keep_original: bool = False,
    initial_known: bool = True,
    ready: Callable[[], None] = lambda: None,
) -> Injection:
    """Wrap the plan's targets, edit or replace their bases, freeze everything else.

    Args:
        model: changed in place.
        plan: targets, modules to save, biases to train.
        factors: by target name; already checked, on the right device and in the adapter's dtype.
        weights: what replaced bases are computed from, and weights that are not in memory read.
        plain: from `hold_plain`, which the model's packed modules have gone through.
        keep_original: keep what replaced bases were: float weights in CPU memory.
        initial_known: whether the factors are those of step 0 (False: a trained adapter was
            loaded onto a kept base).
        ready: called when all is prepared and nothing changed; may wait, or refuse by raising.
    """
    injection = _prepare(model, plan, factors, weights, initial_known)
    ready()
    injection.plain = dict(plain)
    trained_biases = [(name, model.get_parameter(name)) for name in plan.trained_biases]
    try:
        for parameter, _ in injection.requires_grad:
            parameter.requires_grad_(False)
        for target in plan.targets:
            layer = injection.layers[target.name]
            settle_base(
                layer, target, plan, factors[target.name], injection, weights, keep_original
            )
            if layer.use_dora:
                settle_magnitude(layer, target, injection, weights)
        for name, bias in trained_biases:
            injection.biases[name] = (bias, bias.detach().clone())
            bias.requires_grad_(True)
        _place(model, injection)
    except BaseException as error:
        _roll_back(model, injection, error)
        raise
    _forget_lost(model, injection)
    return injection


def forget_originals(model: nn.Module, injection: Injection) -> None:
    """Let go of the originals of replaced bases, which were kept for a while."""
    injection.originals.clear()
    _forget_lost(model, injection)


def _forget_lost(model: nn.Module, injection: Injection) -> None:
    """Let go of packed originals that nobody asked to keep, which would stay in memory."""
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
    """Everything that allocates or may fail, beside the model: nothing of it is touched here."""
    modules = {target.name: model.get_submodule(target.name) for target in plan.targets}
    unloaded = any(map(is_unloaded, modules.values()))
    injection = Injection(
        # A checkpoint that was given as a mapping is held in memory: only where it is needed.
        weights if unloaded else BaseWeights(model, None),
        requires_grad=[(p, p.requires_grad) for p in model.parameters()],
        shared=frozenset(target.name for target in plan.targets if target.shared_with),
        inexact=frozenset(target.name for target in plan.targets if not target.exact),
    )
    for target in plan.targets:
        module = modules[target.name]
        lora_A, lora_B = factors[target.name].lora_A, factors[target.name].lora_B
        layer = layer_class(module)(
            module,
            lora_A.clone(),
            lora_B.clone(),
            scaling=target.scaling,
            dropout=plan.dropout,
            initial=(lora_A, lora_B) if initial_known else None,
            use_dora=plan.use_dora,
            lora_bias=plan.lora_bias,
        )
        for frozen in plan.initializer.frozen:
            getattr(layer, frozen).requires_grad_(False)
        injection.layers[target.name] = layer
        injection.fingerprints[target.name] = fingerprint(weights.present(target))
    for name in plan.modules_to_save:
        original = model.get_submodule(name)
        trained = trainable_copy(original, plan.adapter_dtype)
        injection.trained[name] = TrainedModule(original, trained)
    return injection


@torch.inference_mode(False)
def restore(model: nn.Module, injection: Injection) -> nn.Module:
    """Give the model back as it was: modules, weights, biases and requires_grad flags.

    Raises:
        RuntimeError: if a base was replaced and no copy of it kept; nothing is changed then.
    """
    injection.refuse_lost("unload")
    set_merged(injection, False)
    for name, layer in injection.layers.items():
        if layer.merged:
            raise RuntimeError(
                f"unload: merge_and_unload failed after {name!r} had been merged; call it again, "
                "or reload the base model"
            )
    set_adapter_enabled(injection, False)
    for layer in injection.layers.values():
        if layer.base_state == "edited":
            start = layer.initial_lora_A, layer.initial_lora_B
            add_product(layer.base_layer, *start, layer.scaling, 1)
    release(injection.plain)
    _unwrap(model, injection, lambda trained: trained.original_module)
    return model


@torch.inference_mode(False)
def reinstate(model: nn.Module, injection: Injection) -> None:
    """The inverse of `restore`: the same adapter, where it was, as trained."""
    for parameter, _ in injection.requires_grad:
        parameter.requires_grad_(False)
    _follow(injection)
    injection.plain = hold_plain(model)
    for layer in injection.layers.values():
        if layer.base_state == "edited":
            start = layer.initial_lora_A, layer.initial_lora_B
            add_product(layer.base_layer, *start, layer.scaling, -1)
    for bias, _ in injection.biases.values():
        bias.requires_grad_(True)
    _place(model, injection)
    set_adapter_enabled(injection, True)


def _follow(injection: Injection) -> None:
    """Move a detached adapter to where its model has moved since."""
    for layer in injection.layers.values():
        move = partial(Tensor.to, device=factor_device(layer.base_layer))
        layer._apply(move, recurse=False)
    for trained in injection.trained.values():
        home = next(trained.original_module.parameters(), None)
        if home is not None:
            trained.trained_module.to(home.device)


def merge(model: nn.Module, injection: Injection) -> nn.Module:
    """Fold every adapter into its base weight and unwrap; trained modules take their places."""
    if not injection.merged:
        fold(injection)
    merged = {layer.base_layer for layer in injection.layers.values()}
    release({module: held for module, held in injection.plain.items() if module not in merged})
    flags = {id(parameter): flag for parameter, flag in injection.requires_grad}
    _unwrap(model, injection, TrainedModule.merged_module)
    for name, parameter in injection.untied.items():
        injection.layers[name].base_layer.weight.requires_grad_(flags[id(parameter)])
    return model


def refuse_adapted(model: nn.Module) -> None:
    """Refuse a model that has an adapter already, ours or PEFT's.

    Raises:
        ValueError: one adapter a model.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer | TrainedModule):
            raise ValueError(
                f"{name!r} has an adapter already, and one adapter a model is served; call "
                "unload() or merge_and_unload() on the LoraModel that holds it first, or its "
                "reinitialize() to start it another way"
            )
        if type(module).__module__.startswith("peft."):
            raise ValueError(
                f"{name or 'the model'!r} was injected by PEFT; pass the plain base model "
                "(PEFT's model.unload() returns it)"
            )
        if type(module).__module__.startswith("lora_init.under_peft."):
            raise ValueError(
                f"{name.rpartition('.')[0]!r} was started already, by initialize_peft_model, and "
                "its weight or output is not the original one. Call unload() on that PEFT model, "
                "or load the base model again"
            )


def _place(model: nn.Module, injection: Injection) -> None:
    replace_modules(model, ((layer.base_layer, layer) for layer in injection.layers.values()))
    replace_modules(model, ((t.original_module, t) for t in injection.trained.values()))


def _unwrap(
    model: nn.Module, injection: Injection, pick: Callable[[TrainedModule], nn.Module]
) -> None:
    replace_modules(model, ((layer, layer.base_layer) for layer in injection.layers.values()))
    replace_modules(model, ((t, pick(t)) for t in injection.trained.values()))
    for parameter, flag in injection.requires_grad:
        parameter.requires_grad_(flag)


def _roll_back(model: nn.Module, injection: Injection, error: BaseException) -> None:
    for name in injection.lost():
        layer = injection.layers[name]
        if layer.base_layer in injection.plain:
            layer.base_state = "kept"  # its packed original is released
    lost = injection.lost()
    if lost:
        raise RuntimeError(
            f"injection was interrupted after {len(lost)} base weights had been replaced, the "
            f"first of {lost[0]!r}; reload the base model"
        ) from error
    restore(model, injection)
