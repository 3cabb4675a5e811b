"""PEFT's LoRA layers as this package sees them: which there are, and where their parts lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lora_init.adapters.format import file_shape
from lora_init.peft_models.changes import Journal, SetAttribute
from lora_init.plan.plan import Target

SERVED = ("Linear", "Embedding", "Conv2d", "Linear4bit", "Linear8bitLt")
"""Classes of PEFT's LoRA layers; Conv1D is one of its Linear's."""

START = "initial_factors"
"""The attribute of a PEFT layer that holds its `Start`s by adapter.

Where the base is changed, the base module holds that one `Start` under the same name.
"""


@dataclass(frozen=True)
class Place:
    """Where a module hangs."""

    parent: nn.Module
    attribute: str


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapter's part in one of PEFT's LoRA layers.

    Attributes:
        name: of the adapted module in the base model.
        module: PEFT's layer.
        places: where it hangs; two, where the model uses one module twice.
    """

    name: str
    module: nn.Module
    adapter: str
    places: tuple[Place, ...]

    @property
    def base(self) -> nn.Module:
        return self.module.get_base_layer()

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
        """Further adapters of this layer."""
        return sorted(set(self.module.r) - {self.adapter})

    def factor(self, which: str) -> nn.Parameter:
        """The parameter of "lora_A" or "lora_B"."""
        if self.is_embedding:
            return getattr(self.module, self.container(which))[self.adapter]
        return getattr(self.module, which)[self.adapter].weight

    def container(self, which: str) -> str:
        """The attribute of PEFT's layer that holds this factor of all adapters."""
        return which.replace("lora_", "lora_embedding_") if self.is_embedding else which

    def matrix(self, which: str) -> Float[Tensor, "rows columns"]:
        """A as (rank, in) or B as (out, rank)."""
        return self.factor(which).detach().flatten(1)

    def stored(self, target: Target, which: str, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: a factor of any rank in the layout of PEFT's parameter."""
        rank = len(matrix) if which == "lora_A" else matrix.shape[1]
        return matrix.reshape(file_shape(target, self.base, which, rank))

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
    def start(self) -> Any:
        """What an initialization left here, or None."""
        starts = getattr(self.module, START, None)
        return starts[self.adapter] if starts is not None and self.adapter in starts else None


def check_peft_model(peft_model: nn.Module, adapter_name: str) -> None:
    """Refuse what is no PEFT model, or has no such LoRA adapter.

    Raises:
        TypeError: another kind of model or of adapter.
        ValueError: no adapter of this name.
    """
    if not _is_of_peft(peft_model, "PeftModel"):
        kind = type(peft_model)
        raise TypeError(
            f"peft_model is a {kind.__module__}.{kind.__qualname__}; pass what peft.get_peft_model "
            "returned (lora_init.get_peft_model takes plain models)"
        )
    if adapter_name not in peft_model.peft_config:
        raise ValueError(
            f"adapter_name={adapter_name!r}; the model has {', '.join(peft_model.peft_config)}"
        )
    kind = getattr(peft_model.peft_config[adapter_name], "peft_type", None)
    if getattr(kind, "value", kind) != "LORA":
        raise TypeError(
            f"adapter {adapter_name!r} is of PEFT's type {getattr(kind, 'value', kind)}; only LORA "
            "adapters can be initialized"
        )


def adapted_layers(
    peft_model: nn.Module, adapter_name: str, *, checked: bool = True
) -> list[AdaptedLayer]:
    """The layers that hold the adapter, in model order.

    Args:
        checked: refuse what cannot be initialized or written to a file.

    Raises:
        TypeError: one of a class that is not supported, or with a variant other than DoRA; by name.
        ValueError: one whose adapter is merged, not in memory, or has a scaling of its own.
    """
    places: dict[int, list[Place]] = {}
    names: dict[int, str] = {}
    for name, place in _wrappers(peft_model.base_model.model):
        wrapper = getattr(place.parent, place.attribute)
        places.setdefault(id(wrapper), []).append(place)
        names.setdefault(id(wrapper), name)
    layers = []
    for module_id, found in places.items():
        module = getattr(found[0].parent, found[0].attribute)
        if not _is_of_peft(module, "LoraLayer") or adapter_name not in module.r:
            continue
        layer = AdaptedLayer(names[module_id], module, adapter_name, tuple(found))
        if checked:
            _check_layer(layer, peft_model.peft_config[adapter_name])
        layers.append(layer)
    if checked and not layers:
        raise ValueError(f"no layer of the model holds the adapter {adapter_name!r}")
    return layers


@contextmanager
def plain_base(peft_model: nn.Module, wrappers: Journal | None = None) -> Iterator[nn.Module]:
    """The base model without PEFT's wrappers, which are put back afterwards.

    Then everything that is written for a plain model applies: names, statistics, weights.

    Args:
        wrappers: gets the changes. Its `undo` completes the return to PEFT's wrappers if an
            interrupt hits that.
    """
    base = peft_model.base_model.model
    wrappers = Journal() if wrappers is None else wrappers
    try:
        for _, place in _wrappers(base):
            wrapper = getattr(place.parent, place.attribute)
            inside = (
                wrapper.get_base_layer()
                if _is_of_peft(wrapper, "BaseTunerLayer")
                else wrapper.original_module
            )
            wrappers.do(SetAttribute(place.parent, place.attribute, inside))
        yield base
    finally:
        wrappers.undo()


def wrapper_places(peft_model: nn.Module) -> Journal:
    """Changes, not made, whose `undo` puts PEFT's wrappers back where they are now."""
    found = [place for _, place in _wrappers(peft_model.base_model.model)]
    return Journal(
        SetAttribute(place.parent, place.attribute, getattr(place.parent, place.attribute))
        for place in found
    )


def refuse_merged(peft_model: nn.Module, wanted: str) -> None:
    """Refuse what would change factors that a base weight holds at the moment.

    Raises:
        ValueError: an adapter is merged.
    """
    for name, module in peft_model.base_model.model.named_modules():
        if _is_of_peft(module, "BaseTunerLayer") and module.merged_adapters:
            raise ValueError(
                f"{wanted}: {name!r} has merged adapters ({', '.join(module.merged_adapters)}); "
                "call unmerge_adapter() first"
            )


def saved_modules(peft_model: nn.Module, adapter_name: str) -> list[str]:
    """Names of the modules that are trained whole with this adapter."""
    found = []
    for name, place in _wrappers(peft_model.base_model.model):
        wrapper = getattr(place.parent, place.attribute)
        if adapter_name in getattr(wrapper, "modules_to_save", ()):
            found.append(name)
    return found


def _wrappers(base: nn.Module) -> list[tuple[str, Place]]:
    """PEFT's outermost modules in the model: name and place of each, in model order."""
    found: list[tuple[str, Place]] = []
    seen: set[int] = set()

    def walk(parent: nn.Module, prefix: str) -> None:
        if id(parent) in seen:
            return
        seen.add(id(parent))
        for attribute, child in list(parent._modules.items()):
            if _is_of_peft(child, "BaseTunerLayer", "AuxiliaryTrainingWrapper"):
                found.append((f"{prefix}{attribute}", Place(parent, attribute)))
            elif child is not None:
                walk(child, f"{prefix}{attribute}.")

    walk(base, "")
    return found


def _is_of_peft(module: Any, *names: str) -> bool:
    return any(
        cls.__name__ in names and cls.__module__.split(".")[0] == "peft"
        for cls in type(module).__mro__
    )


def _check_layer(layer: AdaptedLayer, peft_config: Any) -> None:
    kind = type(layer.module).__name__
    if kind not in SERVED:
        raise TypeError(
            f"{layer.name!r} is PEFT's lora.{kind}; layers that can be initialized are "
            f"{', '.join(SERVED)}. Leave it out with exclude_modules"
        )
    variant = type(layer.module.lora_variant.get(layer.adapter)).__name__
    if variant != "NoneType" and not variant.startswith("Dora"):
        raise TypeError(
            f"{layer.name!r} is adapted by PEFT's {variant}, which computes more than s B A x; "
            "plain LoRA and DoRA can be initialized"
        )
    if layer.module.merged_adapters:
        raise ValueError(
            f"{layer.name!r} has merged adapters ({', '.join(layer.module.merged_adapters)}); call "
            "unmerge_adapter() first"
        )
    if any(parameter.is_meta for parameter in layer.parameters()):
        raise ValueError(
            f"{layer.name!r}: its factors are on the meta device; create the PEFT model without "
            "low_cpu_mem_usage"
        )
    divisor = layer.rank**0.5 if peft_config.use_rslora else layer.rank
    if abs(layer.scaling * divisor - layer.alpha) > 1e-6 * layer.alpha:
        raise ValueError(
            f"{layer.name!r} has the scaling {layer.scaling:g}, its alpha {layer.alpha:g} and rank "
            f"{layer.rank} give {layer.alpha / divisor:g}, and files hold only those; call "
            "unscale_layer() first"
        )
