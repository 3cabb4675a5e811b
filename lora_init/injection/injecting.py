"""Injecting a plan's factors, and every way back from there.

What can fail for a reason in the settings or the numbers has been checked before; if the machine
fails in the middle (memory, an interrupt), what was done is undone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_init import packed
from lora_init.base_weights import BaseWeights
from lora_init.factors import Factors, Replacement, low_rank_product
from lora_init.fingerprint import checksum, fingerprint
from lora_init.injection.places import replace_modules
from lora_init.injection.plain import hold_plain, release
from lora_init.injection.weights import Held, exchange, hold, put_back, store_weight
from lora_init.layers import LoraLayer, TrainedModule, layer_class
from lora_init.modules import oriented_weight, widened
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
        biases: each trained bias and the data it does not have now: its original while the adapter
            is on, its trained value while it is off.
        originals: what each replaced base was, where it was kept.
        shared: layers whose weight another module reads too.
        fingerprints: of each target's original weight.
        replacements: how to rebuild each replaced base.
        checksums: of each replaced base.
        from_original_weights: of each layer whose replaced base came from an unquantised
            checkpoint, the fingerprint of the weight there.
        requires_grad: every parameter's flag before injection.
        enabled: whether the adapter is on.
        unmerged: what the base weights (and biases) were before the adapter was merged into them.
        untied: the shared parameter of each layer that got one of its own when it was merged.
        plain: packed modules as they were before they were kept plain.
    """

    layers: dict[str, LoraLayer] = field(default_factory=dict)
    trained: dict[str, TrainedModule] = field(default_factory=dict)
    biases: dict[str, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)
    originals: dict[str, Held] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    fingerprints: dict[str, str] = field(default_factory=dict)
    replacements: dict[str, Replacement] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    from_original_weights: dict[str, str] = field(default_factory=dict)
    requires_grad: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    enabled: bool = True
    unmerged: dict[str, tuple[Held, Tensor | None]] = field(default_factory=dict)
    untied: dict[str, nn.Parameter] = field(default_factory=dict)
    plain: dict[nn.Module, packed.Held] = field(default_factory=dict)

    @property
    def merged(self) -> bool:
        return bool(self.unmerged)

    def lost(self) -> list[str]:
        """Layers whose original weight nobody has any more."""
        return [
            name
            for name, layer in self.layers.items()
            if layer.base_state == "replaced" and name not in self.originals
        ]

    def refuse_lost(self, wanted: str) -> None:
        """Refuse what needs the original base where it is gone.

        Raises:
            RuntimeError: a base was replaced and its original not kept.
        """
        for name in self.lost():
            raise RuntimeError(
                f"{wanted}: the base weight of {name!r} was replaced by a quantised one and no "
                "copy of it was kept, so the original function is gone; initialize with "
                "get_peft_model(..., keep_original=True), or reload the base model"
            )


def inject(
    model: nn.Module,
    plan: Plan,
    factors: Mapping[str, Factors],
    *,
    weights: BaseWeights,
    plain: Mapping[nn.Module, packed.Held],
    keep_original: bool = False,
    initial_known: bool = True,
) -> Injection:
    """Wrap the plan's targets, edit or replace their bases, freeze everything else.

    Args:
        model: changed in place.
        plan: targets, modules to save, biases to train.
        factors: by target name; already checked, on the right device and in the adapter's dtype.
        weights: what replaced bases are computed from.
        plain: from `hold_plain`, which the model's packed modules have gone through.
        keep_original: keep what replaced bases were: float weights in CPU memory.
        initial_known: whether the factors are those of step 0 (False: a trained adapter was
            loaded onto a kept base).
    """
    injection = _prepare(model, plan, factors, initial_known)
    injection.plain = dict(plain)
    trained_biases = [(name, model.get_parameter(name)) for name in plan.trained_biases]
    try:
        for parameter, _ in injection.requires_grad:
            parameter.requires_grad_(False)
        for target in plan.targets:
            layer = injection.layers[target.name]
            _settle_base(
                layer, target, plan, factors[target.name], injection, weights, keep_original
            )
            layer.settle_norms()
            if layer.use_dora:
                layer.lora_magnitude_vector.data = layer.adapted_norms()
        for name, bias in trained_biases:
            injection.biases[name] = (bias, bias.detach().clone())
            bias.requires_grad_(True)
        _place(model, injection)
    except BaseException as error:
        _roll_back(model, injection, error)
        raise
    _forget_lost(model, injection)
    return injection


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
    model: nn.Module, plan: Plan, factors: Mapping[str, Factors], initial_known: bool
) -> Injection:
    """Everything that allocates or may fail, beside the model: nothing of it is touched here."""
    injection = Injection(
        requires_grad=[(p, p.requires_grad) for p in model.parameters()],
        shared=frozenset(target.name for target in plan.targets if target.shared_with),
    )
    for target in plan.targets:
        module = model.get_submodule(target.name)
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
        injection.fingerprints[target.name] = fingerprint(oriented_weight(module))
    for name in plan.modules_to_save:
        original = model.get_submodule(name)
        trained = copy.deepcopy(original).requires_grad_(True)
        injection.trained[name] = TrainedModule(original, trained)
    return injection


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
            store_weight(layer.base_layer, layer.original_weight())
    release(injection.plain)
    _unwrap(model, injection, lambda trained: trained.original_module)
    return model


def reinstate(model: nn.Module, injection: Injection) -> None:
    """The inverse of `restore`: the same adapter, where it was, as trained."""
    for parameter, _ in injection.requires_grad:
        parameter.requires_grad_(False)
    injection.plain = hold_plain(model)
    for layer in injection.layers.values():
        if layer.base_state == "edited":
            weight = widened(oriented_weight(layer.base_layer))
            store_weight(layer.base_layer, weight - layer.initial_product())
    for bias, _ in injection.biases.values():
        bias.requires_grad_(True)
    _place(model, injection)
    set_adapter_enabled(injection, True)


def merge(model: nn.Module, injection: Injection) -> nn.Module:
    """Fold every adapter into its base weight and unwrap; trained modules take their places."""
    if not injection.merged:
        _fold(injection)
    merged = {layer.base_layer for layer in injection.layers.values()}
    release({module: held for module, held in injection.plain.items() if module not in merged})
    flags = {id(parameter): flag for parameter, flag in injection.requires_grad}
    _unwrap(model, injection, lambda trained: trained.trained_module)
    for name, parameter in injection.untied.items():
        injection.layers[name].base_layer.weight.requires_grad_(flags[id(parameter)])
    return model


def set_merged(injection: Injection, merged: bool) -> None:
    """Fold the adapters into the base weights, or take them out again, exactly.

    While merged, the injection holds what the weights were: exact, at the cost of their memory.

    Raises:
        ValueError: a layer has a `lora_bias`, its base none to fold it into.
    """
    if merged == injection.merged:
        return
    if not merged:
        _unfold(injection)
        return
    try:
        _fold(injection, hold_weights=True)
    except BaseException:
        _unfold(injection)
        raise


def _unfold(injection: Injection) -> None:
    for name, (held, bias) in injection.unmerged.items():
        layer = injection.layers[name]
        put_back(layer.base_layer, held)
        if bias is not None:
            layer.base_layer.bias.data = bias
        layer.merged = False
    injection.unmerged = {}


def _fold(injection: Injection, *, hold_weights: bool = False) -> None:
    """Merge layer by layer; remembers what weights and biases were, if they are to be held.

    A layer that is merged already, by a call that failed in the middle, is passed over.
    """
    for name, layer in injection.layers.items():
        if layer.lora_bias is not None and layer.base_layer.bias is None:
            raise ValueError(
                f"layer {name!r} has a lora_bias, and its base module no bias to merge it into; "
                "keep the adapter unmerged, or train without lora_bias"
            )
    set_adapter_enabled(injection, True)
    errors = {}
    for name, layer in injection.layers.items():
        if layer.merged:
            continue
        module = layer.base_layer
        weight = layer.merged_weight()
        bias = None if layer.lora_bias is None else module.bias.data
        if hold_weights:
            injection.unmerged[name] = hold(module), bias
        if name in injection.shared:
            kept = injection.originals.get(name)
            injection.untied[name] = module.weight if kept is None else kept.parameter
        store_weight(module, weight, own=name in injection.shared)
        layer.merged = True
        if bias is not None:
            module.bias.data = (bias + layer.scaling * layer.lora_bias.detach()).to(bias.dtype)
        if packed.is_packed(module):
            norm = torch.linalg.matrix_norm(weight)
            error = torch.linalg.matrix_norm(weight - oriented_weight(module))
            errors[name] = float(error / norm) if norm > 0 else 0.0
    _warn_of_merging(injection, errors)


def _warn_of_merging(injection: Injection, errors: Mapping[str, float]) -> None:
    if errors:
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        warnings.warn(
            f"merged into {len(errors)} quantised weights, which adds a relative error of "
            f"{mean:.1e} on average and {errors[worst]:.1e} in {worst!r}; merge into the "
            "unquantised model to avoid it",
            stacklevel=5,
        )
    for name in sorted(injection.shared):
        warnings.warn(
            f"{name!r} shared its weight with another module and now has one of its own; untie "
            "them in the model's configuration (tie_word_embeddings=False) before saving it",
            stacklevel=5,
        )


def set_adapter_enabled(injection: Injection, enabled: bool) -> bool:
    """Switch the adapter on, or off: then the model computes its original function.

    Returns:
        Whether it was on before.

    Raises:
        RuntimeError: switching off where a base was replaced and no copy of it kept, or where the
            adapter is merged.
    """
    before = injection.enabled
    if enabled == before:
        return before
    if not enabled:
        injection.refuse_lost("disable_adapter")
        if injection.merged:
            raise RuntimeError("the adapter is merged; call unmerge_adapter() first")
    for name, held in injection.originals.items():
        module = injection.layers[name].base_layer
        elsewhere = held.data is not None and held.data.device != module.weight.device
        now = hold(module, on_cpu=elsewhere)
        put_back(module, held)
        injection.originals[name] = now
    for name, (bias, other) in injection.biases.items():
        injection.biases[name] = (bias, exchange(bias, other))
    for part in (*injection.layers.values(), *injection.trained.values()):
        part.adapter_enabled = enabled
    injection.enabled = enabled
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
                "unload() or merge_and_unload() on the LoraModel that holds it first, or its "
                "reinitialize() to start it another way"
            )
        if type(module).__module__.startswith("peft."):
            raise ValueError(
                f"{name or 'the model'!r} was injected by PEFT; pass the plain base model "
                "(PEFT's model.unload() returns it)"
            )


def _settle_base(
    layer: LoraLayer,
    target: Target,
    plan: Plan,
    factors: Factors,
    injection: Injection,
    weights: BaseWeights,
    keep_original: bool,
) -> None:
    """Edit or replace the base weight where the method does so, one layer's memory at a time.

    The layer's `base_state` changes after an edit, which must not be undone if it was not done,
    and before a replacement, which must not pass for the original if it was.
    """
    module = layer.base_layer
    if plan.initializer.base == "keep":
        return
    if factors.replacement is not None:
        shared = bool(target.shared_with)
        weight, replacement = weights.weight(target), factors.replacement
        # A packed module quantises what it is given; values that are quantised already would have
        # their scales rounded twice.
        make = replacement.residual if target.quantized else replacement.base
        replaced = make(weight, target.scaling)
        if keep_original or shared:
            injection.originals[target.name] = hold(module, on_cpu=not shared)
        layer.base_state = "replaced"
        store_weight(module, replaced, own=shared)
        injection.replacements[target.name] = replacement
        if target.quantized and weights.originals is not None:
            injection.from_original_weights[target.name] = fingerprint(weight)
        injection.checksums[target.name] = checksum(oriented_weight(module))
        return
    # The factors as they are stored, so that a 16-bit adapter is subtracted as rounded.
    editable = not target.shared_with and not target.quantized
    if not editable or not _edit(layer, oriented_weight(module), factors.lora_A, factors.lora_B):
        layer.base_state = "in_forward"


def _edit(layer: LoraLayer, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Subtract s B0 A0 from a float32 weight, if that can be undone; whether it was done."""
    if weight.dtype not in (torch.float32, torch.float64):
        return False
    product = low_rank_product(lora_A, lora_B, layer.scaling)
    residual = torch.sub(weight, product, out=product)  # one layer's memory, not two
    if float(_largest(residual)) > LARGEST_EDIT_GROWTH * float(_largest(weight)):
        return False
    store_weight(layer.base_layer, residual)
    layer.base_state = "edited"
    return True


def move_initial_factors(layer: LoraLayer, lora_A: Tensor, lora_B: Tensor) -> None:
    """Give a layer the initial factors of another start, and its base what belongs to them."""
    state = layer.base_state
    if state == "edited":
        weight = layer.original_weight()
        layer.base_state = "in_forward"
        if not _edit(layer, weight, lora_A, lora_B):
            store_weight(layer.base_layer, weight)
    layer.initial_lora_A, layer.initial_lora_B = lora_A.clone(), lora_B.clone()
    layer.settle_norms()


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


def _largest(weight: Tensor) -> Tensor:
    low, high = torch.aminmax(weight)
    return torch.maximum(-low, high)
