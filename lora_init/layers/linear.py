"""Adapted linear layers: nn.Linear, transformers' Conv1D, bitsandbytes' 4-bit and 8-bit."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

from lora_init.layers.adapted_product import adapted_product
from lora_init.layers.base import LoraLayer, common_dtype
from lora_init.layers.decomposed_product import decomposed_product
from lora_init.layers.low_rank_sum import low_rank_sum, wide_dtype
from lora_init.layers.tensor_parallel import AddedToProduct, beside
from lora_init.layers.transforms import is_transformed
from lora_init.weights.offload import is_hooked, stored_weight
from lora_init.weights.sharded import is_dtensor

STACKED_POSITIONS = {"cpu": 2048}
"""Maximum number of positions, by device, for which copying the inputs is cheaper than reading the
weight a second time."""


class LinearLayer(LoraLayer):
    """``h = base(x) + s B A x``, x (..., in) and h (..., out)."""

    def _low_rank(
        self,
        x: Float[Tensor, "*batch in"],
        lora_A: Float[Tensor, "rank in"],
        lora_B: Float[Tensor, "out rank"],
    ) -> Float[Tensor, "*batch out"]:
        dtype, x = common_dtype(x, lora_A), x.to(lora_A.device)
        if dtype is torch.float64 or not torch.is_autocast_enabled(x.device.type):
            x, lora_A, lora_B = (cast(tensor, dtype) for tensor in (x, lora_A, lora_B))
        # Autocast converts the operands of its products, except float64.
        hidden = functional.linear(x, lora_A) * self.scaling
        return functional.linear(hidden, lora_B)

    def _base_without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        base = self.base_layer
        if not is_watched(base):
            if self.module_type == "Linear":
                return functional.linear(x, base.weight), base.bias
            if self.module_type == "Conv1D":
                return x @ base.weight, base.bias
        result = base(x)  # only the module's forward can multiply by the weight
        return (result, None) if base.bias is None else (result - base.bias, base.bias)

    # -- single autograd functions, where they compute the same function ---------------------------

    def _adapted_output(self, x: Tensor) -> Tensor:
        if self.lora_bias is not None or self.drops() or not self._is_product(x):
            if is_dtensor(stored_weight(self.base_layer)):
                with AddedToProduct(self._parallel_delta):
                    return self.base_layer(x)
            return super()._adapted_output(x)
        base, lora_A, lora_B = self.base_layer, self.lora_A, self.output_factor
        initial = None
        if self.base_state == "in_forward":
            initial = self.initial_lora_A, self.initial_lora_B
        one_dtype = initial is None and x.dtype is lora_A.dtype and x.dtype is lora_B.dtype
        if is_small(x) and not torch.compiler.is_compiling():
            dtype = x.dtype if one_dtype else wide_dtype(x, lora_A)
            wide = cast(x, dtype)
            delta = applied(wide, lora_A, lora_B)
            if initial is not None:  # products of equal shapes: exactly zero at step 0
                delta = delta - applied(wide, *initial)
            # Scale before rounding, so that the gradients are not rounded first.
            return cast(torch.add(base.forward(x), delta, alpha=self.scaling), x.dtype)
        weight = base.weight.T if self.module_type == "Linear" else base.weight
        if one_dtype:
            return adapted_product(x, weight, lora_A, lora_B, base.bias, self.scaling)
        return low_rank_sum(x, weight, lora_A, lora_B, base.bias, initial, self.scaling)

    def _parallel_delta(self, x: Tensor) -> Tensor:
        """s (B A - B0 A0) x under tensor parallelism."""
        factors = beside(self.lora_A, x), beside(self.output_factor, x)
        delta = self._low_rank(x, *factors)
        if self.base_state == "in_forward":
            initial = beside(self.initial_lora_A, x), beside(self.initial_lora_B, x)
            delta = delta - self._low_rank(x, *initial)
        return delta

    def _decomposed_output(self, x: Tensor) -> Tensor:
        weight = self._plain_weight(x)
        is_wide = x.dtype == self.lora_magnitude_vector.dtype and x.dtype.itemsize >= 4
        is_short = x.numel() <= STACKED_POSITIONS.get(x.device.type, 0) * x.shape[-1]
        # The norms need wide products, because 16 bits would round them.
        if weight is None or self.drops() or not (is_wide and is_short):
            return super()._decomposed_output(x)
        return decomposed_product(
            x, weight, self.lora_A, self.output_factor, self.lora_magnitude_vector,
            self.base_layer.bias, self.base_square_norms, self.scaling,
        )  # fmt: skip

    def _adapted_without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None, torch.dtype]:
        weight = self._plain_weight(x)
        if weight is None:
            return super()._adapted_without_bias(x)
        outputs = adapted_product(x, weight, self.lora_A, self.output_factor, None, self.scaling)
        return outputs, self.base_layer.bias, outputs.dtype

    def _plain_weight(self, x: Tensor) -> Float[Tensor, "in out"] | None:
        """The base's weight, if V x is a sum of plain products of one dtype; else None."""
        if self.base_state == "in_forward" or not self._is_product(x):
            return None
        if not x.dtype == self.lora_A.dtype == self.lora_B.dtype:
            return None
        weight = self.base_layer.weight
        return weight.T if self.module_type == "Linear" else weight

    def _is_product(self, x: Tensor) -> bool:
        """Whether the base only computes x W + bias, from plain tensors of x's dtype.

        Not cached: a hook, a dtype or a weight can change between two calls.
        """
        base = self.base_layer
        if self.module_type not in ("Linear", "Conv1D") or is_watched(base):
            return False
        weight, bias = base.weight, base.bias
        if weight.is_meta or not (is_plain(x) and is_plain(weight)):
            return False
        if x.dtype is not weight.dtype or not (bias is None or bias.dtype is x.dtype):
            return False
        return not torch.is_autocast_enabled(x.device.type) and not is_transformed()


def is_small(x: Tensor) -> bool:
    """Whether call overhead exceeds the arithmetic for this input.

    Such inputs use torch's operations, whose backward pass runs without Python. The GPU limit is an
    estimate: 512 positions of width 4096. The CPU limit is lower for 16-bit inputs, whose products
    are slow.
    """
    if x.is_cuda:
        return x.numel() <= 2**21
    return x.numel() <= (2**10 if x.dtype.itemsize < 4 else 2**14)


def applied(
    x: Float[Tensor, "*batch in"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
) -> Float[Tensor, "*batch out"]:
    """B A x, in x's dtype."""
    hidden = functional.linear(x, cast(lora_A, x.dtype))
    return functional.linear(hidden, cast(lora_B, x.dtype))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without the overhead of the call if the dtype matches."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is strided and neither nested nor of a subclass."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_nested
    return plain and tensor.layout is torch.strided


def is_watched(module: nn.Module) -> bool:
    """Whether the module must be called, because it has a hook or a non-standard forward.

    The base module may have been replaced after injection, so its class is checked too.
    """
    return bool(
        not (type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D")
        or is_hooked(module)
        or has_global_hooks()
    )


def has_global_hooks() -> bool:
    """Whether a hook is registered for all modules. torch has no public way to ask."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
