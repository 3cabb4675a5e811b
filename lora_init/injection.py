"""Factors -> model, and back. The only code that changes a model.

What can fail for a reason in the settings or the numbers has been checked before; if the machine
fails in the middle (memory, an interrupt), what was done is undone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_init.factors import Factors, Replacement
from lora_init.fingerprint import checksum, fingerprint
from lora_init.layers import (
    LoraLayer,
    TrainedModule,
    low_rank_product,
    stored_orientation,
)
from lora_init.modules import oriented_weight
from lora_init.plan import Plan, Target

# An edited float32 weight comes back within (growth + 1) 2^-24 max|W|, where growth is how much
# larger than W's its largest entry is: at most 5.4e-7 for 8, inside the promised 1e-6.
LARGEST_EDIT_GROWTH = 8.0


@dataclass
class Injection:
    """What was done to a model, enough to undo it.

    Attributes:
        layers: the adapted layers by name.
        trained: the whole-trained modules by name.
        fingerprints: of each target's original weight.
        replacements: how to rebuild each replaced base.
        checksums: of each replaced base.
        requires_grad: every parameter's flag before injection.
    """

    layers: dict[str, LoraLayer] = field(default_factory=dict)
    trained: dict[str, TrainedModule] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    replacements: dict[str, Replacement] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    requires_grad: list[tuple[nn.Parameter, bool]] = field(default_factory=list)


def inject(
    model: nn.Module,
    plan: Plan,
    factors: Mapping[str, Factors],
    *,
    dropout: float = 0.0,
    initial_known: bool = True,
) -> Injection:
    """Wrap the plan's targets, edit or replace their bases, freeze everything else.

    Args:
        model: changed in place.
        plan: targets and modules to save.
        factors: by target name; already checked, on the right device and in the adapter's dtype.
        dropout: of the adapter's input.
        initial_known: whether the factors are those of step 0 (False: a trained adapter was
            loaded onto a kept base).
    """
    injection = _prepare(model, plan, factors, dropout, initial_known)
    try:
        for parameter, _ in injection.requires_grad:
            parameter.requires_grad_(False)
        paths = module_paths(model)
        for target in plan.targets:
            layer = injection.layers[target.name]
            _settle_base(layer, target, plan, factors[target.name], injection)
            _replace(model, paths[id(layer.base_layer)], layer)
        for trained in injection.trained.values():
            _replace(model, paths[id(trained.original_module)], trained)
    except BaseException as error:
        _roll_back(model, injection, error)
        raise
    return injection


def _prepare(
    model: nn.Module,
    plan: Plan,
    factors: Mapping[str, Factors],
    dropout: float,
    initial_known: bool,
) -> Injection:
    """Everything that allocates or may fail, beside the model: nothing of it is touched here."""
    keep_original = bool(getattr(plan.options, "keep_original", False))
    injection = Injection(requires_grad=[(p, p.requires_grad) for p in model.parameters()])
    for target in plan.targets:
        module = model.get_submodule(target.name)
        lora_A, lora_B = factors[target.name].lora_A, factors[target.name].lora_B
        layer = LoraLayer(
            module,
            lora_A.clone(),
            lora_B.clone(),
            scaling=target.scaling,
            dropout=dropout,
            base_state="kept",
            initial=(lora_A, lora_B) if initial_known else None,
            original_weight_copy=(
                oriented_weight(module).to("cpu", copy=True)
                if keep_original and plan.initializer.base == "replace"
                else None
            ),
        )
        for frozen in plan.initializer.frozen:
            getattr(layer, frozen).requires_grad_(False)
        injection.layers[target.name] = layer
        injection.fingerprints[target.name] = fingerprint(module)
    for name in plan.modules_to_save:
        original = model.get_submodule(name)
        trained = copy.deepcopy(original).requires_grad_(True)
        injection.trained[name] = TrainedModule(original, trained)
    return injection


def restore(model: nn.Module, injection: Injection) -> nn.Module:
    """Give the model back as it was: modules, weights and requires_grad flags.

    Raises:
        RuntimeError: if a base was replaced and no copy of it kept; nothing is changed then.
    """
    weights_lost = [
        name
        for name, layer in injection.layers.items()
        if layer.base_state == "replaced" and layer.original_weight_copy is None
    ]
    if weights_lost:
        injection.layers[weights_lost[0]].original_weight()  # raises, and says what to do
    for layer in injection.layers.values():
        if layer.base_state in ("edited", "replaced"):
            _store(layer.base_layer, layer.original_weight())
    _unwrap(model, injection, lambda trained: trained.original_module)
    return model


def merge(model: nn.Module, injection: Injection) -> nn.Module:
    """Fold every adapter into its base weight and unwrap; trained modules take their places."""
    for layer in injection.layers.values():
        _store(layer.base_layer, layer.merged_weight())
    _unwrap(model, injection, lambda trained: trained.trained_module)
    return model


def set_adapter_enabled(injection: Injection, enabled: bool) -> bool:
    """Switch all adapters on, or off: then the model computes its original function.

    Returns:
        Whether they were on before.

    Raises:
        RuntimeError: switching off where a base was replaced and no copy of it kept.
    """
    layers: Iterable[LoraLayer | TrainedModule] = [
        *injection.layers.values(),
        *injection.trained.values(),
    ]
    if not enabled:
        for layer in injection.layers.values():
            if layer.base_state == "replaced" and layer.original_weight_copy is None:
                layer.original_weight()  # raises, before anything is switched
    before = all(layer.adapter_enabled for layer in layers)
    for layer in layers:
        layer.adapter_enabled = enabled
    return before


def refuse_adapted(model: nn.Module) -> None:
    """Refuse a model that has an adapter already, ours or PEFT's.

    Raises:
        ValueError: one adapter a model.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer | TrainedModule):
            raise ValueError(
                f"{name!r} has an adapter already, and one adapter a model is served; call "
                "unload() or merge_and_unload() on the LoraModel that holds it first"
            )
        if type(module).__module__.startswith("peft."):
            raise ValueError(
                f"{name or 'the model'!r} was injected by PEFT; pass the plain base model "
                "(PEFT's model.unload() returns it)"
            )


def module_paths(model: nn.Module) -> dict[int, list[str]]:
    """All names of every module: one that is registered twice is replaced in both places."""
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(name)
    return paths


def _settle_base(
    layer: LoraLayer, target: Target, plan: Plan, factors: Factors, injection: Injection
) -> None:
    """Edit or replace the base weight where the method does so, one layer's memory at a time.

    The layer's `base_state` changes only after the weight: an undoing must not undo what was not
    done.
    """
    module = layer.base_layer
    weight = oriented_weight(module)
    if plan.initializer.base == "keep":
        return
    if plan.initializer.base == "replace":
        replaced = factors.replacement.base(weight, target.scaling)
        injection.replacements[target.name] = factors.replacement
        injection.checksums[target.name] = checksum(replaced)
        _store(module, replaced)
        layer.base_state = "replaced"
        return
    if weight.dtype in (torch.float32, torch.float64):
        # The factors as they are stored, so that a 16-bit adapter is subtracted as rounded.
        product = low_rank_product(factors.lora_A, factors.lora_B, target.scaling)
        residual = torch.sub(weight, product, out=product)  # one layer's memory, not two
        if float(_largest(residual)) <= LARGEST_EDIT_GROWTH * float(_largest(weight)):
            _store(module, residual)
            layer.base_state = "edited"
            return
    layer.base_state = "in_forward"


def _roll_back(model: nn.Module, injection: Injection, error: BaseException) -> None:
    lost = [
        name
        for name, layer in injection.layers.items()
        if layer.base_state == "replaced" and layer.original_weight_copy is None
    ]
    if lost:
        raise RuntimeError(
            f"injection was interrupted after {len(lost)} base weights had been replaced, the "
            f"first of {lost[0]!r}; reload the base model"
        ) from error
    restore(model, injection)


def _largest(weight: Tensor) -> Tensor:
    low, high = torch.aminmax(weight)
    return torch.maximum(-low, high)


def _store(module: nn.Module, weight: Tensor) -> None:
    """Give the module's parameter new data; the old memory is never written to.

    It may be a checkpoint mapped from disk, whose pages would be copied one by one on the first
    write (six times slower on MiniLM), or memory that other processes share.
    """
    stored = stored_orientation(module, weight).to(module.weight.device, module.weight.dtype)
    module.weight.data = stored.contiguous()


def _replace(model: nn.Module, paths: list[str], module: nn.Module) -> None:
    for path in paths:
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)


def _unwrap(model: nn.Module, injection: Injection, pick) -> None:
    paths = module_paths(model)
    for layer in injection.layers.values():
        if id(layer) in paths:  # an interrupted injection may not have placed its last one
            _replace(model, paths[id(layer)], layer.base_layer)
    for trained in injection.trained.values():
        if id(trained) in paths:
            _replace(model, paths[id(trained)], pick(trained))
    for parameter, flag in injection.requires_grad:
        parameter.requires_grad_(flag)
