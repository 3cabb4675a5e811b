"""s B0 A0 taken off a PEFT layer in the forward pass, where its base weight cannot hold that.

The weight stays the original one: a 16-bit weight would round the difference, a quantized one
cannot store it, and a tied one belongs to another module too. Instead the base module's output
loses s B0 A0 x while the layer is enabled and not merged. PEFT then adds s B A x to it, in the
adapter's precision, so both products cancel at step 0.

`disable_adapter` and rows of ``adapter_names="__base__"`` give the original function on every
base, edited or not. Merging adds s (B A - B0 A0) to the weight.

Everything here is a function or plain data on the modules, so copies, pickles and replicas work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_init.factors import low_rank_product
from lora_init.peft_models.changes import Change, SetAttribute
from lora_init.peft_models.layers import START, AdaptedLayer
from lora_init.peft_models.start import Start
from lora_init.weights import bitsandbytes
from lora_init.weights.kinds import embedding_scale, stored_weight


class AddHook(Change):
    """Give a module a forward hook."""

    def __init__(self, module: nn.Module, hook: Any) -> None:
        self.module, self.hook = module, hook

    def make(self) -> None:
        if self.hook not in self.module._forward_hooks.values():
            self.module.register_forward_hook(self.hook, with_kwargs=True)

    def undo(self) -> None:
        for key, hook in list(self.module._forward_hooks.items()):
            if hook is self.hook:
                self.module._forward_hooks_with_kwargs.pop(key, None)
                del self.module._forward_hooks[key]


def subtract_initial(base: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Any:
    """A forward hook of a base module: base(x) - s B0 A0 x, in the wider dtype of the two."""
    start = getattr(base, START)
    if not start.is_subtracting():
        return None
    start.output_dtype = output.dtype
    x = args[0] if args else next(iter(kwargs.values()))
    return output - initial_output(base, start, x)


def complete_output(
    layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    """A forward hook of PEFT's layer: the original function where no adapter is to be used.

    The output gets the base module's own dtype back, which `subtract_initial` had widened.
    """
    base = layer.get_base_layer()
    start = getattr(base, START)
    x = args[0] if args else kwargs["x"]
    if layer.disable_adapters:
        if start.base == "in_forward":
            return None
        return (output + initial_output(base, start, x)).to(output.dtype)
    dtype = start.output_dtype if start.is_subtracting() else output.dtype
    names = kwargs.get("adapter_names")
    if names is not None and "__base__" in names:
        rows = [row for row, name in enumerate(names) if name == "__base__"]
        whole = output.to(torch.promote_types(output.dtype, start.initial_A.dtype), copy=True)
        whole[rows] = whole[rows] + initial_output(base, start, x[rows]).to(whole.dtype)
        output = whole
    return output.to(dtype)


def initial_output(base: nn.Module, start: Start, x: Tensor) -> Tensor:
    """s B0 A0 x, by the operations that PEFT's layer computes s B A x with."""
    lora_A, lora_B = start.factors()
    if isinstance(base, nn.Embedding):
        rows = functional.embedding(x, lora_A.T) @ lora_B.T * start.scaling
        scale = embedding_scale(base)
        return rows if scale is None else rows * scale
    x = x.to(lora_A.dtype)
    if isinstance(base, nn.Conv2d):
        kernel = lora_A.view(-1, *base.weight.shape[1:])
        hidden = functional.conv2d(x, kernel, None, base.stride, base.padding)
        return functional.conv2d(hidden, lora_B[:, :, None, None]) * start.scaling
    return functional.linear(functional.linear(x, lora_A), lora_B) * start.scaling


@dataclass(frozen=True)
class DeltaWeight:
    """PEFT's `get_delta_weight` of a layer that subtracts in the forward pass.

    The first adapter that is merged takes s B0 A0 along, and the last one that is unmerged
    brings it back: only for those `merged_adapters` is empty.
    """

    layer: nn.Module

    def __call__(self, adapter: str) -> Tensor:
        layer = AdaptedLayer("", self.layer, adapter, ())
        factors = layer.matrix("lora_A"), layer.matrix("lora_B")
        delta = low_rank_product(*factors, layer.scaling)
        if not self.layer.merged_adapters:
            delta -= getattr(layer.base, START).product()
        if bitsandbytes.is_packed(layer.base):
            return delta
        return stored_weight(layer.base, delta).view(layer.base.weight.shape)


class DecomposedNorm:
    """PEFT's `get_weight_norm` of DoRA on a layer that subtracts in the forward pass.

    PEFT computes ‖W + s B A‖ from the base's weight; this takes s B0 A0 from it. Merging passes no
    adapter's name, and a product that `DeltaWeight` has made.
    """

    def __init__(self, layer: nn.Module, adapter: str) -> None:
        self.layer, self.adapter = layer, adapter

    def __call__(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        magnitude = self.layer.lora_magnitude_vector[self.adapter]
        norm = type(magnitude).get_weight_norm
        if adapter_name is None:
            return norm(magnitude, weight, lora_weight, scaling)
        base = self.layer.get_base_layer()
        # In float32: a norm in 16 bits would be a gain that is not 1 at step 0.
        with torch.autocast(weight.device.type, enabled=False):
            product = getattr(base, START).product()
            if not bitsandbytes.is_packed(base):
                product = stored_weight(base, product).view(weight.shape)
            residual = weight.to(product.dtype) - product.to(weight.device)
            return norm(magnitude, residual, lora_weight.to(product.dtype), scaling)


def subtraction(layer: AdaptedLayer) -> list[Change]:
    """The changes that let a layer subtract its start in the forward pass."""
    changes: list[Change] = [
        AddHook(layer.base, subtract_initial),
        SetAttribute(layer.module, "get_delta_weight", DeltaWeight(layer.module)),
    ]
    if layer.magnitude is not None:
        decomposed = layer.module.lora_magnitude_vector[layer.adapter]
        norm = DecomposedNorm(layer.module, layer.adapter)
        changes.append(SetAttribute(decomposed, "get_weight_norm", norm))
    return changes
