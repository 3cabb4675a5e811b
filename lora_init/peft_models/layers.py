"""PEFT's LoRA layers: which ones a model has, and where their parts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.adapters.expert_layout import from_file, to_file
from lora_init.factors import block_matrix, matrix_blocks
from lora_init.layers.attention import refusal as attention_refusal
from lora_init.peft_models.holder import Place, is_attention, is_of_peft, output_place, wrappers
from lora_init.peft_models.start import Start, records
from lora_init.weights.experts import is_transposed
from lora_init.weights.format import WEIGHT
from lora_init.weights.kinds import FORMATS, class_format, known_format
from lora_init.weights.sharded import fsdp_unit, is_sharded, whole

SUPPORTED = (
    "Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "Linear4bit", "Linear8bitLt",
    "TorchaoLoraLinear", "HqqLoraLinear", "GPTQLoraLinear", "AwqLoraLinear", "AqlmLoraLinear",
    "EetqLoraLinear", "IncLoraLinear", "ParamWrapper", "MultiheadAttention",
)  # fmt: skip
"""The supported classes of PEFT's LoRA layers; Conv1D is one of its Linear layers."""

AXES = {"lora_A": 0, "lora_B": 1}
"""The dimension of each factor of PEFT that counts its rank."""

START = "initial_factors"
"""The attribute of a changed base module that holds its `Start`.

PEFT's layer has it too, with the adapter's name appended.
"""


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapter's part in one of PEFT's LoRA layers.

    Attributes:
        name: of the adapted module in the base model; for experts, of the fused parameter.
        module: PEFT's layer.
        places: where the layer is; two if the model uses one module twice.
        attention: the name of the attention module whose projection this is; None for others.
    """

    name: str
    module: Any
    adapter: str
    places: tuple[Place, ...]
    attention: str | None = None

    @property
    def base(self) -> Any:
        return self.module.get_base_layer()

    @property
    def weight_name(self) -> str:
        """The name of the adapted weight in the base module."""
        if is_attention(self.module):
            return "in_proj_weight"
        return getattr(self.module, "parameter_name", WEIGHT)

    @property
    def base_weight(self) -> Float[Tensor, "*experts out in"]:
        """The present weight of the base module."""
        stored = FORMATS["Linear"] if self.attention else known_format(self.base)
        return stored.read(self.base, self.weight_name)

    @property
    def base_mark(self) -> str:
        """The attribute of a changed base module that holds the `Start` of this weight."""
        return START if self.weight_name == WEIGHT else f"{START}_{self.weight_name}"

    @property
    def experts(self) -> int | None:
        """The number of experts of a fused parameter; None for one matrix."""
        is_stack = self.is_parameter and self.module.get_param().ndim == 3
        return self.module.num_experts if is_stack else None

    @property
    def is_parameter(self) -> bool:
        """Whether PEFT replaces the weight instead of adding to the output of the base module."""
        return is_of_peft(self.module, "ParamWrapper")

    @property
    def is_embedding(self) -> bool:
        return self.adapter in self.module.lora_embedding_A

    @property
    def rank(self) -> int:
        return self.module.r[self.adapter]

    @property
    def alpha(self) -> float:
        return self.module.lora_alpha[self.adapter]

    @property
    def scaling(self) -> float:
        return self.module.scaling[self.adapter]

    @property
    def others(self) -> list[str]:
        """The other adapters of this layer."""
        return sorted(set(self.module.r) - {self.adapter})

    def factor(self, which: str) -> nn.Parameter:
        """The parameter of "lora_A" or "lora_B"."""
        held = getattr(self.module, self.container(which))[self.adapter]
        return held if self.is_embedding else held.weight

    def container(self, which: str) -> str:
        """The attribute of PEFT's layer that holds this factor of all adapters."""
        return which.replace("lora_", "lora_embedding_") if self.is_embedding else which

    def matrix(self, which: str) -> Float[Tensor, "*experts rows columns"]:
        """A as (rank, in) or B as (out, rank); not of grouped convolutions."""
        value = whole(self.factor(which)).flatten(1)
        return value if self.experts is None else from_file(which, value, self.experts)

    def stored(self, which: str, matrix: Tensor, like: Tensor | None = None) -> Tensor:
        """A factor of any rank, as an initializer returns it, in the layout of PEFT's parameter.

        For a grouped convolution, PEFT's A reads the channels of all groups, and its B has one
        block for each group.

        Args:
            like: a tensor in this layout, if the parameter itself may be sharded.
        """
        if self.experts is not None:
            return to_file(which, matrix)
        sizes = (self.factor(which) if like is None else like).shape
        if which == "lora_A":
            return block_matrix(matrix, self.groups).reshape(-1, *sizes[1:])
        blocks = matrix_blocks(matrix, self.groups)
        return blocks.reshape(*blocks.shape, *sizes[2:])

    def joined(self, which: str, own: Tensor, other: Tensor) -> Tensor:
        """Two factors in PEFT's layout as one of their summed rank, group by group."""
        axis = AXES[which]
        if self.experts is not None:
            parts = [from_file(which, one, self.experts) for one in (own, other)]
            return to_file(which, torch.cat(parts, dim=axis + 1))
        if axis == 0:
            parts = [one.unflatten(0, (self.groups, -1)) for one in (own, other)]
            return torch.cat(parts, dim=1).flatten(0, 1)
        return torch.cat([own, other], dim=axis)

    def divided(self, which: str, value: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `joined` for two factors of the same rank."""
        axis = AXES[which]
        if self.experts is not None:
            own, other = from_file(which, value, self.experts).chunk(2, dim=axis + 1)
            return to_file(which, own), to_file(which, other)
        if axis == 0:
            own, other = value.unflatten(0, (self.groups, 2, -1)).unbind(1)
            return own.flatten(0, 1), other.flatten(0, 1)
        own, other = value.chunk(2, dim=axis)
        return own, other

    def width(self, which: str) -> int:
        """The size of a factor of PEFT along its rank."""
        rank = (self.experts or 1) * self.rank
        return rank // self.groups if which == "lora_B" else rank

    @property
    def is_called(self) -> bool:
        """Whether a forward pass calls the layer, not only its `get_delta_weight`.

        PEFT's layer for an attention reads the change of its output projection.
        """
        return self.attention is None or is_attention(self.module)

    @property
    def groups(self) -> int:
        """The groups of a convolution; 1 for other modules."""
        return getattr(self.base, "groups", 1)

    @property
    def bias(self) -> nn.Parameter | None:
        """b of `lora_bias`."""
        return None if self.is_embedding else self.module.lora_B[self.adapter].bias

    @property
    def magnitude(self) -> nn.Parameter | None:
        """m of DoRA."""
        held = self.module.lora_magnitude_vector
        return held[self.adapter].weight if self.adapter in held else None

    def parameters(self) -> list[nn.Parameter]:
        found = [self.factor("lora_A"), self.factor("lora_B"), self.bias, self.magnitude]
        return [parameter for parameter in found if parameter is not None]

    @property
    def mark(self) -> str:
        """The attribute of PEFT's layer that holds the adapter's `Start`."""
        return f"{START}_{self.adapter}"

    @property
    def start(self) -> Start | None:
        """What an initialization of this adapter left here."""
        return getattr(self.module, self.mark, None)

    @property
    def base_start(self) -> Start:
        """The start, perhaps of another adapter, that has changed the base of this layer."""
        return getattr(self.base, self.base_mark)


def adapted_layers(
    peft_model: Any, adapter_name: str, *, checked: bool = True
) -> list[AdaptedLayer]:
    """The layers that hold the adapter, in model order.

    Args:
        checked: refuse layers that cannot be initialized or written to a file.

    Raises:
        TypeError: a layer of an unsupported class, or with a variant other than DoRA; by name.
        ValueError: a layer that is merged, not in memory, or whose scaling was changed.
    """
    found: dict[int, tuple[str, list[Place], str | None]] = {}
    for outer in wrappers(peft_model):
        attention = outer[0] if is_attention(outer[1].module) else None
        for name, place in _nested(*outer):
            if is_of_peft(place.module, "LoraLayer") and adapter_name in place.module.r:
                found.setdefault(id(place.module), (name, [], attention))[1].append(place)
    layers = [
        AdaptedLayer(name, places[0].module, adapter_name, tuple(places), attention)
        for name, places, attention in found.values()
    ]
    if checked:
        if not layers:
            raise ValueError(f"no layer of the model holds the adapter {adapter_name!r}")
        for layer in layers:
            _check_layer(layer, peft_model.peft_config[adapter_name])
    return layers


def refuse_sharded_layers(base: nn.Module, layers: Sequence[AdaptedLayer]) -> None:
    """Refuse layers under FSDP2 whose factors cannot be written, or whose start cannot be computed.

    Raises:
        ValueError: by the layer's name, with the reason.
    """
    for layer in layers:
        if not any(map(is_sharded, (*layer.parameters(), *layer.base.parameters()))):
            continue
        reason = None
        if layer.magnitude is not None:
            reason = "use_dora=True reads the norms of whole weights"
        elif layer.is_parameter or layer.attention is not None:
            reason = f"it is PEFT's {type(layer.module).__name__}"
        elif fsdp_unit(base, layer.name) is None:
            reason = "it is in no unit inside the model: call fully_shard on the model's layers too"
        if reason is not None:
            raise ValueError(
                f"{layer.name!r} is sharded by FSDP2, which is not supported here: {reason}. Call "
                "initialize_peft_model before the model is sharded"
            )


def _nested(name: str, place: Place) -> list[tuple[str, Place]]:
    """The wrapper at a place; of parameters, all nested wrappers, the innermost first.

    PEFT's layer for an attention module stands for both projections.
    """
    if is_attention(place.module):
        return [(f"{name}.in_proj", place), (f"{name}.out_proj", output_place(place.module))]
    found = []
    while is_of_peft(place.module, "ParamWrapper"):
        matrix = place.module.parameter_name
        found.append((name if matrix == WEIGHT else f"{name}.{matrix}", place))
        place = Place(place.module, "base_layer")
    return found[::-1] or [(name, place)]


def forget_removed(model: Any) -> None:
    """Forget the initialization of adapters whose layers have left the model."""
    for name in list(records(model)):
        if not any(layer.start for layer in adapted_layers(model, name, checked=False)):
            del records(model)[name]


def _unsupported_parameter(layer: AdaptedLayer) -> str | None:
    """What a parameter is that PEFT adapts and this package does not; None if it does."""
    stored = class_format(layer.base)
    if stored is None or layer.weight_name not in stored.matrices(layer.base):
        return f"a parameter of a {type(layer.base).__name__}"
    if stored.operation not in ("routed", "selection"):
        return f"the {layer.weight_name} of a {stored.name} in PEFT's ParamWrapper"
    if layer.module.get_param().is_meta or stored.refusal(layer.base) is not None:
        return f"a parameter of a module that {stored.refusal(layer.base) or 'is not loaded'}"
    # PEFT reads experts that do not declare a layout as (out, in).
    if layer.experts and is_transposed(layer.base) != getattr(layer.base, "is_transposed", False):
        return f"stored as (in, out), but PEFT's factors of a {type(layer.base).__name__} are not"
    return None


def _check_layer(layer: AdaptedLayer, peft_config: Any) -> None:
    kind = type(layer.module).__name__
    if kind not in SUPPORTED:
        raise TypeError(
            f"{layer.name!r} is PEFT's lora.{kind}, which is not supported: must be one of "
            f"{', '.join(SUPPORTED)}. Leave it out with exclude_modules"
        )
    if kind == "ParamWrapper" and (reason := _unsupported_parameter(layer)) is not None:
        raise TypeError(
            f"{layer.name!r} is {reason}, which is not supported in a PEFT model. Leave it out of "
            "target_parameters, or use lora_init.get_peft_model"
        )
    if is_attention(layer.module) and (reason := attention_refusal(layer.base)) is not None:
        raise TypeError(
            f"{layer.attention!r} {reason}, which is not supported in a PEFT model. Leave it out "
            "with exclude_modules"
        )
    if layer.groups > 1 and layer.magnitude is not None:
        raise TypeError(
            f"use_dora=True is not supported for {layer.name!r}, a convolution with "
            f"groups={layer.groups}: PEFT's DoRA reads the norms of another weight. "
            "Leave it out (exclude_modules), or use lora_init.get_peft_model"
        )
    variant = layer.module.lora_variant.get(layer.adapter)
    if variant is not None and not type(variant).__name__.startswith("Dora"):
        raise TypeError(
            f"{layer.name!r} is adapted by PEFT's {type(variant).__name__}, which is not supported:"
            " it computes more than s B A x. Use plain LoRA or DoRA"
        )
    if layer.module.merged_adapters:
        raise ValueError(
            f"{layer.name!r} has merged adapters ({', '.join(layer.module.merged_adapters)}). Call "
            "unmerge_adapter() or unfuse_lora() first"
        )
    if any(parameter.is_meta for parameter in layer.parameters()):
        raise ValueError(
            f"{layer.name!r}: its factors are on the meta device. Create the PEFT model without "
            "low_cpu_mem_usage"
        )
    divisor = layer.rank**0.5 if peft_config.use_rslora else layer.rank
    if abs(layer.scaling * divisor - layer.alpha) > 1e-6 * layer.alpha:
        raise ValueError(
            f"{layer.name!r} has the scaling {layer.scaling:g}, but its alpha {layer.alpha:g} and "
            f"rank {layer.rank} give {layer.alpha / divisor:g}, and files cannot store another "
            "one. Call unscale_layer() first"
        )
