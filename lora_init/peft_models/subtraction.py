"""Subtracting s B0 A0 in the forward pass of a PEFT layer, if its base weight cannot hold that.

The weight stays the original one: a 16-bit weight would round the difference, a quantized one
cannot store it, and a tied one belongs to another module too. Instead, a hook subtracts s B0 A0 x
from the base module's output while the layer is enabled and not merged. PEFT then adds s B A x in
the adapter's precision, so both products cancel at step 0.

`disable_adapter` and the rows of ``adapter_names="__base__"`` give the original function on every
base, edited or not. Merging adds s (B A - B0 A0) to the weight. An adapter that a program weights
by c (diffusers' `set_adapters`, PEFT's `set_scale`) gives W + c s (B A - B0 A0).

Hooks are functions, and replaced methods are `functools.partial` objects, so copies, pickles and
replicas work.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_init.factors import block_matrix, low_rank_product, matrix_blocks
from lora_init.injection.base import comes_back
from lora_init.linalg.matrix import widened
from lora_init.peft_models.changes import Attribute, Hook, Operation
from lora_init.peft_models.expert_factors import activated, subtracting_factors
from lora_init.peft_models.layers import START, AdaptedLayer
from lora_init.peft_models.start import Start
from lora_init.plan.plan import Plan, Target
from lora_init.weights.embedding import embedding_scale
from lora_init.weights.kinds import known_format
from lora_init.weights.patches import convolve_all_channels, pointwise
from lora_init.weights.sharded import is_sharded

EDITED_DTYPES = (torch.float32, torch.float64)
"""The dtypes of weights that can hold the difference without a loss that matters."""


def subtracts_in_forward(layer: AdaptedLayer, target: Target, plan: Plan) -> bool:
    """Whether a subtracting method leaves this base weight unchanged, whatever its values are."""
    if plan.initializer.base != "subtract":
        return False
    if target.quantized:
        return not plan.requantizes
    if target.shared_with or layer.is_parameter or target.attention is not None:
        return True
    if not target.exact:
        return True
    if is_sharded(layer.base.weight):  # whoever sharded it may keep other copies
        return True
    return not _reads_base_weight(layer) and layer.base.weight.dtype not in EDITED_DTYPES


def holds_edit(layer: AdaptedLayer, start: Start, weight: Tensor) -> bool:
    """Whether subtracting s B0 A0 from the weight can be undone by adding it."""
    if weight.dtype not in EDITED_DTYPES or _reads_base_weight(layer):
        return True
    return comes_back(weight, start.initial_A, start.initial_B, start.scaling)


def check_subtraction(layer: AdaptedLayer, target: Target, plan: Plan) -> None:
    """Refuse a layer that can hold the difference neither in its weight nor in its forward pass.

    Raises:
        ValueError: DoRA with dropout on a weight that cannot be edited.
    """
    if subtracts_in_forward(layer, target, plan) and _reads_base_weight(layer):
        fix = (
            "or quantized_base='requantize'"
            if target.quantized
            else "or untie the weights, or remove its hooks"
        )
        raise ValueError(
            f"lora_dropout={layer.module.lora_dropout[layer.adapter].p} with use_dora=True is not "
            f"supported for {target.name!r} by {plan.initializer.name}: PEFT reads the base's "
            f"weight there, and it cannot hold the difference. Use lora_dropout=0, {fix}"
        )


def _reads_base_weight(layer: AdaptedLayer) -> bool:
    """Whether PEFT's forward pass reads the base's weight: DoRA with dropout does."""
    dropout = layer.module.lora_dropout
    drops = layer.adapter in dropout and isinstance(dropout[layer.adapter], nn.Dropout)
    return layer.magnitude is not None and drops and not layer.is_embedding


def complete(layer: AdaptedLayer, operation: Operation) -> None:
    """Let a layer on a subtracted base compute the original function, and merge, at any weight."""
    if not layer.is_parameter and layer.attention is None:
        operation.set(Hook(layer.module, complete_output), True, is_mark=True)
    delta = Attribute(layer.module, "get_delta_weight")
    function = delta_weight if layer.attention is None else attention_delta
    operation.set(delta, partial(function, layer.module), is_mark=True)


def subtract(layer: AdaptedLayer, operation: Operation) -> None:
    """Let a layer subtract its start in the forward pass."""
    if layer.attention is not None:
        return  # PEFT merges for each forward pass, with what `attention_delta` returns
    if layer.is_parameter:
        factors = partial(subtracting_factors, layer.module, layer.base_start)
        activate = partial(activated, layer.module, layer.adapter)
        operation.set(Attribute(layer.module, "get_delta_factors"), factors, is_mark=True)
        operation.set(Attribute(layer.module, "_activate_lora"), activate, is_mark=True)
        return
    if layer.base._forward_pre_hooks:
        operation.set(Hook(layer.base, note_input, before=True), True, is_mark=True)
    operation.set(Hook(layer.base, subtract_initial), True, is_mark=True)
    one = known_format(layer.base)
    if not one.writable:
        merge = partial(refuse_merge, layer.name, one.describe(layer.base))
        operation.set(Attribute(layer.module, "merge"), merge, is_mark=True)
    if layer.magnitude is not None:
        decomposed = layer.module.lora_magnitude_vector[layer.adapter]
        norm = Attribute(decomposed, "get_weight_norm")
        operation.set(norm, partial(weight_norm, layer), is_mark=True)


def note_input(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A pre-hook of a base module, before those that may change its input: the adapter's input."""
    getattr(base, START).given = args[0] if args else next(iter(kwargs.values()))


def subtract_initial(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Any:
    """A forward hook of a base module: base(x) - c s B0 A0 x, in the wider dtype of the two."""
    start = getattr(base, START)
    given, start.given = start.given, None
    if not start.is_subtracting():
        return None
    start.output_dtype = output.dtype
    weight = start.weight()
    if weight == 0:
        return None
    x = given
    if x is None:
        x = args[0] if args else next(iter(kwargs.values()))
    return output - _weighted(initial_output(base, start, x), weight)


def complete_output(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Any:
    """A forward hook of PEFT's layer: the original function for rows without an adapter.

    An edited weight lacks s B0 A0, of which an adapter of weight c subtracts only c times.

    The output gets the dtype of the base module's own output, which `subtract_initial` widened.
    """
    base = layer.get_base_layer()
    start = getattr(base, START)
    x = args[0] if args else kwargs["x"]
    if layer.disable_adapters:
        if start.base == "in_forward":
            return None
        return (output + initial_output(base, start, x)).to(output.dtype)
    if layer.merged:
        return None
    dtype = start.output_dtype if start.is_subtracting() else output.dtype
    weight = start.weight()
    if weight != 1 and start.base == "edited":
        output = output + (1 - weight) * initial_output(base, start, x)
    names = kwargs.get("adapter_names")
    if names is not None and "__base__" in names:
        rows = [row for row, name in enumerate(names) if name == "__base__"]
        whole = output.to(torch.promote_types(output.dtype, start.initial_A.dtype), copy=True)
        initial = _weighted(initial_output(base, start, x[rows]), weight)
        whole[rows] = whole[rows] + initial.to(whole.dtype)
        output = whole
    return output.to(dtype)


def _weighted(output: Tensor, weight: float) -> Tensor:
    return output if weight == 1 else output * weight


def initial_output(base: Any, start: Start, x: Tensor) -> Tensor:
    """s B0 A0 x, by the operations with which PEFT's layer computes s B A x.

    PEFT's A of a grouped convolution reads all channels, those of other groups with zeros.
    """
    lora_A, lora_B = start.factors()
    operation = known_format(base).operation
    if operation == "lookup":
        rows = functional.embedding(x, lora_A.T) @ lora_B.T * start.scaling
        scale = embedding_scale(base)
        return rows if scale is None else rows * scale
    x = x.to(lora_A.dtype)
    if operation == "convolution":
        hidden = convolve_all_channels(base, x, block_matrix(lora_A, base.groups))
        return pointwise(base, hidden, matrix_blocks(lora_B, base.groups)) * start.scaling
    return functional.linear(functional.linear(x, lora_A), lora_B) * start.scaling


def delta_weight(module: Any, adapter: str) -> Tensor:
    """PEFT's `get_delta_weight` of a layer on a subtracted base.

    The first adapter that is merged subtracts c s B0 A0, less what an edited weight lacks already,
    and adds it again when it is unmerged.

    Raises:
        NotImplementedError: a grouped convolution, for which PEFT refuses to merge too.
    """
    layer = AdaptedLayer("", module, adapter, ())
    if layer.groups > 1:
        raise NotImplementedError(
            f"get_delta_weight is not supported for a convolution with groups={layer.groups}: "
            "PEFT's lora_A reads the channels of all groups. Keep the adapter unmerged"
        )
    start = layer.base_start
    missing = 0.0
    if _is_first(module, adapter):
        missing = start.weight(adapter) - (start.base == "edited")
    if missing == 0 and start.base == "edited":
        return type(module).get_delta_weight(module, adapter)
    if layer.is_parameter and layer.experts is None:
        # PEFT calls this in each forward pass, so gradients must reach the factors.
        lora_A, lora_B = (widened(layer.factor(which)) for which in ("lora_A", "lora_B"))
        delta = (lora_B * layer.scaling) @ lora_A
    else:
        delta = low_rank_product(layer.matrix("lora_A"), layer.matrix("lora_B"), layer.scaling)
    if missing:
        delta -= _weighted(start.product(), missing)
    stored = known_format(layer.base).stored(layer.base, delta)
    return stored.to(module.get_param().dtype) if layer.is_parameter else stored


def attention_delta(module: Any, adapter: str) -> Tensor:
    """PEFT's `get_delta_weight` of a projection of an attention; differentiable.

    The first adapter that is merged subtracts c s B0 A0. The operations are those of PEFT, so both
    products cancel at step 0.
    """
    delta = type(module).get_delta_weight(module, adapter)
    if not _is_first(module, adapter):
        return delta
    start = AdaptedLayer("", module, adapter, ()).base_start
    lora_A, lora_B = start.factors(adapter)
    if lora_B.device.type == "cpu" and lora_B.dtype.itemsize == 2:
        lora_A, lora_B = lora_A.float(), lora_B.float()
    initial = (lora_B @ lora_A) * start.scaling
    return delta - _weighted(initial, start.weight(adapter)).to(delta.dtype)


def _is_first(module: Any, adapter: str) -> bool:
    """Whether an adapter is the first of those that are merged, or the only one.

    PEFT's attention layer reads the change of its output projection before and after it changes
    the list of merged adapters.
    """
    return next(iter(module.merged_adapters), adapter) == adapter


def refuse_merge(name: str, kind: str, *args: Any, **kwargs: Any) -> None:
    """PEFT's `merge` of a layer that subtracts in the forward pass, on a weight of a quantizer.

    PEFT would quantize the sum into a new base module, which has no hook for the subtraction.
    """
    raise ValueError(
        f"merging is not supported for layer {name!r}, whose base is quantized ({kind}). Keep the "
        "adapter unmerged, or save it and merge it into the unquantized model"
    )


def weight_norm(
    layer: AdaptedLayer,
    weight: Tensor,
    lora_weight: Tensor,
    scaling: float,
    adapter_name: str | None = None,
) -> Tensor:
    """PEFT's `get_weight_norm` of DoRA on a layer that subtracts in the forward pass.

    PEFT computes ‖W + s B A‖ from the base's weight, and this function subtracts s B0 A0 from W.
    Merging passes no adapter's name, and a product that `delta_weight` has made.
    """
    magnitude = layer.module.lora_magnitude_vector[layer.adapter]
    norm = partial(type(magnitude).get_weight_norm, magnitude)
    if adapter_name is None:
        return norm(weight, lora_weight, scaling)
    # In float32: a norm that is rounded to 16 bits would give a gain other than 1 at step 0.
    with torch.autocast(weight.device.type, enabled=False):
        product = known_format(layer.base).stored(layer.base, layer.base_start.product())
        residual = weight.to(product.dtype) - product.to(weight.device)
        return norm(residual, lora_weight.to(product.dtype), scaling)
