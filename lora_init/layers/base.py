"""The base class of all adapted layers: the factors, the forward pass, the effective weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.factors import low_rank_product, output_factor
from lora_init.layers import dora
from lora_init.layers.effective_weight import effective_weight
from lora_init.layers.input import only_input
from lora_init.linalg.matrix import widened
from lora_init.linalg.precision import full_precision
from lora_init.weights.float import is_float8
from lora_init.weights.format import WEIGHT, WeightFormat
from lora_init.weights.kinds import FORMATS, class_format, known_format
from lora_init.weights.offload import HOOK_ATTRIBUTES, stored_weight

BaseState = Literal["kept", "edited", "in_forward", "replaced"]
"""How a layer accounts for its initial product s B0 A0:

- ``kept``: not at all, the base weight is the original one;
- ``edited``: it was subtracted from the base weight (float32 and float64 bases);
- ``in_forward``: the forward pass subtracts it and the base weight is the original one. Used for
  16-bit bases, whose rounding would lose the edit; for quantized bases; for weights that another
  module shares; and for edits too large to be undone in float32;
- ``replaced``: the base weight is a quantized one.
"""


CONSTANTS = ("base_square_norms", "initial_projection")
"""Buffers from which DoRA's norm is computed."""


class LoraLayer(nn.Module):
    """A module with a low-rank adapter, ``h = base(x) + s (B A x + b)``.

    With a core R, ``h = base(x) + s (B R A x + b)``, and R is trained while A and B are frozen.

    With DoRA (Liu et al. 2024, arXiv 2402.09353) ``h = m · V x / ‖V‖ + bias``. V is the adapted
    weight ``W + s B A``, ‖V‖ its row norms, m a trained magnitude; see `lora_init.layers.dora`.
    Subclasses implement how their type of module applies a matrix to an input.

    Attributes:
        base_layer: the wrapped module; `module_type` is the name of its type.
        matrix: the name of the adapted matrix in the module.
        lora_A, lora_B: trainable factors, (rank, in) and (out, rank).
        lora_core: R, (rank, rank), or None.
        lora_bias: b, (out,), or None.
        lora_magnitude_vector: m, (out,), or None.
        initial_lora_A, initial_lora_B: the factors at step 0; with a core, A and B R. None if a
            file was loaded onto a kept base, because the file does not contain them.
        scaling: s.
        base_state: see `BaseState`.
        merged: whether the base weight contains the adapter; the forward pass then adds nothing.
        on_read: called whenever `weight` is read; see `lora_init.model.verification`.
    """

    drops_inputs = True
    matrix: str = WEIGHT
    on_read: Callable[[], object] | None = None

    base_layer: Any
    lora_core: Tensor | None
    lora_bias: Tensor | None
    # Any: which of them are None depends on `base_state` and `use_dora`.
    lora_magnitude_vector: Tensor | Any
    initial_lora_A: Tensor | Any
    initial_lora_B: Tensor | Any
    base_square_norms: Tensor | Any
    initial_projection: Tensor | Any

    def __init__(
        self,
        base_layer: nn.Module,
        lora_A: Float[Tensor, "*experts rank in"],
        lora_B: Float[Tensor, "*experts out rank"],
        *,
        scaling: float,
        dropout: float,
        initial: tuple[Tensor, Tensor] | None,
        use_dora: bool = False,
        lora_bias: bool = False,
        core: Float[Tensor, "*experts rank rank"] | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_type = known_format(base_layer).name
        self._kind = _kind(base_layer)
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.lora_core = None if core is None else nn.Parameter(core)
        rows = lora_B.shape[-2]
        zeros = lora_B.new_zeros(rows) if lora_bias else None
        self.lora_bias = None if zeros is None else nn.Parameter(zeros)
        self.use_dora = use_dora
        ones = lora_B.new_ones(rows, dtype=widened(lora_B).dtype) if use_dora else None
        self.lora_magnitude_vector = None if ones is None else nn.Parameter(ones)
        initial_A, initial_B = initial if initial is not None else (None, None)
        self.register_buffer("initial_lora_A", initial_A)
        self.register_buffer("initial_lora_B", initial_B)
        # Constants of DoRA's norm, set by `settle_norms`.
        self.register_buffer("base_square_norms", None, persistent=False)
        self.register_buffer("initial_projection", None, persistent=False)
        self.dropout = nn.Dropout(dropout) if dropout > 0 and self.drops_inputs else nn.Identity()
        self.scaling = scaling
        self.base_state: BaseState = "kept"
        self.adapter_enabled = True
        self.merged = False
        self.training = self.dropout.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        """Look up attributes that this class lacks (in_features, stride, …) in the base layer."""
        # Inlines torch's lookup, because a forward pass does several of them.
        own = self.__dict__
        if "_modules" in own:
            if name in own["_parameters"]:
                return own["_parameters"][name]
            if name in own["_modules"]:
                return own["_modules"][name]
            if name in own["_buffers"]:
                return own["_buffers"][name]
        # base_layer may not be set yet. Protocol methods (copying, pickling) are not delegated.
        if name in ("base_layer", *HOOK_ATTRIBUTES) or name.startswith("__"):
            return super().__getattr__(name)  # raises
        return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("weight", "bias"):
            super().__setattr__(name, value)
        # Tying weights again assigns the parameter that the base already has.
        elif value is not getattr(self.base_layer, name):
            raise RuntimeError(
                f"{name} cannot be set on an adapted {self.module_type}, because it is the sum of "
                f"the base's {name} and the adapter. Set it before get_peft_model, or set "
                f"base_layer.{name} to change the base under the adapter"
            )

    def _apply(self, fn: Callable, recurse: bool = True) -> LoraLayer:
        """Move or convert. DoRA's constants stay at least float32: 16 bits overflow and round."""
        before = {name: getattr(self, name) for name in CONSTANTS}
        super()._apply(fn, recurse)
        for name, wide in before.items():
            now = getattr(self, name)
            if now is not None and now.dtype.itemsize < 4:
                setattr(self, name, wide.to(now.device, torch.float32))
        return self

    @property
    def _format(self) -> WeightFormat:
        if _kind(self.base_layer) == self._kind:
            return FORMATS[self.module_type]
        # The base module may have been replaced by one of another class, or its weight sharded.
        return class_format(self.base_layer) or FORMATS[self.module_type]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]

    @property
    def output_factor(self) -> Float[Tensor, "*experts out rank"]:
        """B, or B R with a core: the adapter adds s times this times A x."""
        return output_factor(self.lora_B, self.lora_core)

    # -- the forward pass ------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if len(args) == 1 and not kwargs else only_input(self.base_layer, args, kwargs)
        if self.merged:
            return self.base_layer(x)
        if not self.adapter_enabled:
            return self._original_output(x)
        if self.use_dora:
            return self._decomposed_output(x)
        return self._adapted_output(x)

    def _adapted_output(self, x: Tensor) -> Tensor:
        """base(x) + s (B A x + b)."""
        result = self.base_layer(x)
        delta = self._low_rank(self.dropout(x), self.lora_A, self.output_factor)
        if self.base_state == "in_forward":
            # Separate products instead of one of rank 2r: at step 0 they cancel exactly.
            delta -= self._low_rank(x, self.initial_lora_A, self.initial_lora_B)
        if self.lora_bias is not None:
            delta += self.scaling * self._along_outputs(self.lora_bias)
        # Add before rounding: a 16-bit result plus a float32 delta is a float32 sum.
        return added(delta, result).to(result.dtype)

    def _decomposed_output(self, x: Tensor) -> Tensor:
        """g (W x + s B A x) + bias, with g = m / ‖W + s B A‖ row by row."""
        gain = self._along_outputs(self.gain())
        if not self.drops():
            values, bias, dtype = self._adapted_without_bias(x)
            return dora.scaled(values, gain, bias).to(dtype)
        # As in the authors' code: dropout applies to all terms except one output of the base.
        dropped_x = self.dropout(x)
        frozen, bias = self._base_without_bias(x)
        dtype, dropped = frozen.dtype, self._base_without_bias(dropped_x)[0]
        delta = self._low_rank(dropped_x, self.lora_A, self.output_factor)
        if self.base_state == "in_forward":
            initial = self.initial_lora_A, self.initial_lora_B
            frozen = frozen - self._low_rank(x, *initial)
            dropped = dropped - self._low_rank(dropped_x, *initial)
        result = frozen + (gain - 1) * dropped + gain * delta
        return (result if bias is None else result + bias).to(dtype)

    def drops(self) -> bool:
        """Whether dropout changes the input of the adapter in the next forward pass."""
        dropout = self.dropout
        return isinstance(dropout, nn.Dropout) and dropout.training

    def _adapted_without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """V x without dropout, the bias, and the dtype of the base's output."""
        base, bias = self._base_without_bias(x)
        delta = self._low_rank(x, self.lora_A, self.output_factor)
        if self.base_state == "in_forward":
            delta -= self._low_rank(x, self.initial_lora_A, self.initial_lora_B)
        return added(delta, base), bias, base.dtype

    def gain(self) -> Float[Tensor, " out"]:
        """DoRA's g = m / ‖V‖, without a gradient through the norm (section 4.3 of the paper)."""
        return self.lora_magnitude_vector / self.adapted_norms()

    def adapted_norms(self, weight: Float[Tensor, "out in"] | None = None) -> Float[Tensor, " out"]:
        """‖V‖, the row norms of the adapted weight.

        Args:
            weight: the base's present weight, if the base layer does not hold it.
        """
        initial = None
        if self.base_state == "in_forward":
            initial = self.initial_lora_A, self.initial_lora_B, self.initial_projection
        if weight is None and self.stored_weight.is_meta:
            raise RuntimeError(
                "DoRA reads the weight that it decomposes, and this one is offloaded (it is on the "
                "meta device); keep the adapted modules in memory, or train without use_dora"
            )
        return dora.adapted_norms(
            self._oriented_weight() if weight is None else weight,
            self.base_square_norms,
            self.lora_A,
            self.output_factor,
            self.scaling,
            initial,
        )

    def settle_norms(self, weight: Float[Tensor, "out in"]) -> None:
        """Compute the constants of DoRA's norm. Call this whenever the base weight has changed."""
        self.base_square_norms = dora.square_norms(weight)
        if self.base_state == "in_forward":
            self.initial_projection = dora.projection(weight, self.initial_lora_A)

    def _original_output(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        if self.base_state != "edited":
            return result  # also for a replaced base: disabling restored the original
        initial = self._low_rank(x, self.initial_lora_A, self.initial_lora_B)
        return (result + initial).to(result.dtype)

    # -- the weights -----------------------------------------------------------------------------

    @property
    def stored_weight(self) -> nn.Parameter | Any:
        """The base's present parameter, as the module stores it."""
        return stored_weight(self.base_layer, self.matrix)

    @property
    def weight(self) -> Tensor:
        """The effective weight of this layer, in its module's dtype and layout.

        The tensor is computed, so writing to it changes nothing. Gradients flow to the adapter. For
        packed modules it contains dequantized values. Dropout does not apply.
        """
        if self.on_read is not None:
            self.on_read()
        try:
            return self._present_weight()
        except AttributeError as error:  # otherwise torch would look up `weight` elsewhere
            raise RuntimeError(f"the effective weight cannot be computed: {error}") from error

    @property
    def bias(self) -> Tensor | None:
        """The effective bias of this layer, in the module's dtype."""
        bias = self.base_layer.bias
        if self.merged or not self.adapter_enabled or self.lora_bias is None:
            return bias
        added_bias = self.scaling * widened(self.lora_bias)
        if bias is None:
            return added_bias.to(self._format.float_dtype(self.base_layer))
        return (widened(bias) + added_bias).to(bias.dtype)

    def _present_weight(self) -> Tensor:
        stored = self.stored_weight
        if stored.is_meta:
            return stored
        one, dtype = self._format, self._format.float_dtype(self.base_layer)
        if one.quantized:
            stored = one.read(self.base_layer)
        elif is_float8(stored):
            stored = stored.float()
        if self.merged or (not self.adapter_enabled and self.base_state != "edited"):
            return stored.to(dtype)
        initial = gain = None
        if not self.adapter_enabled:
            factors = self.initial_lora_A, self.initial_lora_B
        else:
            factors = self.lora_A, self._exact_output_factor()
            gain = self.gain() if self.use_dora else None
            if self.base_state == "in_forward":
                initial = self.initial_lora_A, self.initial_lora_B
        reorders = one.operation == "convolution"
        total = effective_weight(
            one.orient(stored) if reorders else stored, *factors, self.scaling,
            transposed=one.transposed, dtype=dtype, initial=initial, gain=gain,
        )  # fmt: skip
        return one.stored(self.base_layer, total) if reorders else total

    def _exact_output_factor(self) -> Float[Tensor, "*experts out rank"]:
        """`output_factor` with all bits of float32, for weights."""
        with full_precision():
            return self.output_factor

    def _oriented_weight(self) -> Float[Tensor, "*experts out in"]:
        """The base's present weight, dequantized for packed modules."""
        return self._format.read(self.base_layer, self.matrix)

    def delta_weight(self) -> Float[Tensor, "*experts out in"]:
        """s (B A - B0 A0), in float32 or wider; s B A on a kept or replaced base.

        Without DoRA this is the change by training.
        """
        delta = low_rank_product(self.lora_A, self._exact_output_factor(), self.scaling)
        if self.base_state in ("edited", "in_forward"):
            delta -= self.initial_product()
        return delta

    def initial_product(self) -> Float[Tensor, "*experts out in"]:
        """s B0 A0, bit-identical to what an edit subtracts (see `injection.editing`)."""
        return low_rank_product(self.initial_lora_A, self.initial_lora_B, self.scaling)

    def original_weight(self) -> Float[Tensor, "*experts out in"]:
        """The weight before injection, in float32 or wider.

        Raises:
            RuntimeError: the base was replaced, so this layer does not have the original weight.
        """
        if self.base_state == "replaced":
            raise RuntimeError("the base weight was replaced; the layer does not hold the original")
        weight = widened(self._oriented_weight())
        return weight + self.initial_product() if self.base_state == "edited" else weight

    def merged_weight(self) -> Float[Tensor, "*experts out in"]:
        """The weight of a plain layer that computes the same function (without dropout)."""
        weight = widened(self._oriented_weight())
        merged = weight + low_rank_product(self.lora_A, self._exact_output_factor(), self.scaling)
        if self.base_state == "in_forward":
            merged -= self.initial_product()
        if self.use_dora:
            merged *= self.gain().detach()[:, None]
        return merged

    def extra_repr(self) -> str:
        dora = ", use_dora=True" if self.use_dora else ""
        core = ", core=True" if self.lora_core is not None else ""
        state = f"base_state={self.base_state!r}"
        return f"rank={self.rank}, scaling={self.scaling:g}, {state}{dora}{core}"

    # -- what a kind of module knows -------------------------------------------------------------

    def _low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """s B A applied to x, in the wider of x's and the factors' dtypes.

        16-bit factors must not round the outputs of a float32 base. The scaling applies between the
        products, where each position has only `rank` values.
        """
        raise NotImplementedError

    def _base_without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """W x, and the bias in the layout of the outputs or None."""
        raise NotImplementedError

    def _along_outputs(self, vector: Float[Tensor, " out"]) -> Tensor:
        """Reshape a vector with one value per output to broadcast over the outputs."""
        return vector


def added(delta: Tensor, result: Tensor) -> Tensor:
    """Compute result + delta, in delta's memory if its dtype can hold the sum.

    delta is a fresh tensor. The base's result may be held by a hook and is not overwritten.
    Allocating another output would cost more than the addition.
    """
    if torch.promote_types(delta.dtype, result.dtype) == delta.dtype:
        return delta.add_(result)
    return result + delta


def common_dtype(x: Tensor, factor: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, factor.dtype)


def _kind(module: nn.Module) -> tuple[type, type]:
    """The classes of a module and of its weight, which decide its format."""
    return type(module), type(module._parameters.get(WEIGHT))
