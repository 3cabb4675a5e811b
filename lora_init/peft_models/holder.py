"""The model that holds PEFT's layers: a PeftModel, or a model that has them in itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from lora_init.injection import Transaction
from lora_init.layers.attention import SplitAttention
from lora_init.weights.offload import absence
from lora_init.weights.sharded import is_dtensor, is_unit, reshard


@dataclass(frozen=True)
class Place:
    """An attribute of a parent module that holds one of PEFT's wrappers."""

    parent: nn.Module
    attribute: str

    @property
    def module(self) -> Any:
        return getattr(self.parent, self.attribute)

    def put(self, module: nn.Module) -> None:
        setattr(self.parent, self.attribute, module)


def checked_holder(peft_model: Any, adapter_name: str) -> Any:
    """The model that holds a LoRA adapter of this name: a PeftModel, or a model with PEFT's layers.

    Of a SentenceTransformer, this is its transformers model.

    Raises:
        TypeError: another kind of model or of adapter.
        ValueError: no adapter of this name.
    """
    holder = peft_model
    inner = getattr(peft_model, "transformers_model", None)
    if not hasattr(peft_model, "peft_config") and isinstance(inner, nn.Module):
        holder = inner
    configs = getattr(holder, "peft_config", None)
    is_module = isinstance(holder, nn.Module) and not is_of_peft(holder, "BaseTuner")
    if not is_module or not isinstance(configs, dict):
        kind = type(peft_model)
        raise TypeError(
            f"peft_model={kind.__module__}.{kind.__qualname__} is not supported: it must be a PEFT "
            "model, or a model with an adapter of PEFT. Pass what peft.get_peft_model returned, or "
            "call model.add_adapter first (lora_init.get_peft_model takes plain models)"
        )
    if adapter_name not in configs:
        raise ValueError(
            f"adapter_name={adapter_name!r} is not supported: must be one of {', '.join(configs)}"
        )
    kind = getattr(configs[adapter_name], "peft_type", None)
    kind = getattr(kind, "value", kind)
    if kind != "LORA":
        raise TypeError(
            f"adapter {adapter_name!r} has peft_type={kind}, which is not supported: must be LORA"
        )
    return holder


def is_peft_model(model: Any) -> bool:
    """Whether the model is a PeftModel. PEFT's layers can also be in a model of another class."""
    return is_of_peft(model, "PeftModel")


def base_model(peft_model: Any) -> nn.Module:
    """The model in which PEFT has put its layers; without a PeftModel, the model itself."""
    return peft_model.base_model.model if is_peft_model(peft_model) else peft_model


@contextmanager
def disabled(peft_model: Any) -> Iterator[None]:
    """A context in which the layers compute the base model. Gradient flags are restored."""
    if is_peft_model(peft_model):
        with peft_model.disable_adapter():
            yield
        return
    layers = [place.module for _, place in wrappers(peft_model)]
    flags = {parameter: parameter.requires_grad for parameter in peft_model.parameters()}
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def wrappers(peft_model: Any) -> list[tuple[str, Place]]:
    """PEFT's outermost modules in the base model: name and place of each, in model order."""
    found: list[tuple[str, Place]] = []
    seen: set[int] = set()

    def walk(parent: nn.Module, prefix: str) -> None:
        if id(parent) in seen:
            return
        seen.add(id(parent))
        for attribute, child in list(parent._modules.items()):
            if is_of_peft(child, "BaseTunerLayer", "AuxiliaryTrainingWrapper"):
                found.append((f"{prefix}{attribute}", Place(parent, attribute)))
            elif child is not None:
                walk(child, f"{prefix}{attribute}.")

    walk(base_model(peft_model), "")
    return found


@contextmanager
def plain_base(peft_model: Any, transaction: Transaction) -> Iterator[nn.Module]:
    """The base model without PEFT's wrappers, which are put back afterwards.

    Names, statistics and weights are then those of a plain model, in which attention modules with
    an adapter are split into their projections. If an interrupt stops the
    return to the wrappers, the transaction completes it.
    """
    found = [(place, place.module) for _, place in wrappers(peft_model)]
    inside = [output_place(wrapper) for _, wrapper in found if is_attention(wrapper)]
    found = [(place, place.module) for place in inside if is_of_peft(place.module)] + found
    split: dict[int, SplitAttention] = {}
    try:
        for place, wrapper in found:
            transaction.undo_by(partial(place.put, wrapper))
            if is_attention(wrapper):
                whole = wrapper.get_base_layer()
                place.put(split.setdefault(id(whole), SplitAttention(whole)))
            elif is_of_peft(wrapper, "BaseTunerLayer"):
                place.put(wrapper.get_base_layer())
            else:
                place.put(wrapper.original_module)
        yield base_model(peft_model)
    finally:
        for place, wrapper in found:
            place.put(wrapper)


@contextmanager
def through_root(peft_model: Any, base: nn.Module) -> Iterator[None]:
    """A context in which a call of the base model runs the hooks of FSDP2 on `peft_model`.

    The first call of a unit must be made through the root, which also gathers parameters that no
    other unit holds. Afterwards, all parameters are in parts again.
    """
    if base is peft_model or not is_unit(peft_model):
        yield
        return
    chain = (base, peft_model.__call__), (peft_model, base.forward)
    former = [vars(module).get("forward") for module, _ in chain]
    try:
        for module, forward in chain:
            module.forward = forward
        yield
    finally:
        for (module, _), forward in zip(chain, former, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
        reshard(peft_model)


def refuse_merged(peft_model: Any, wanted: str) -> None:
    """Refuse an operation that would change factors while a base weight holds them.

    Raises:
        ValueError: an adapter is merged.
    """
    for name, module in base_model(peft_model).named_modules():
        if not is_of_peft(module, "BaseTunerLayer"):
            continue
        merged: Any = module.merged_adapters
        if merged:
            undo = "unmerge_adapter" if is_peft_model(peft_model) else "unfuse_lora"
            raise ValueError(
                f"{wanted} is not supported here: {name!r} has merged adapters "
                f"({', '.join(merged)}). Call {undo}() first"
            )


def is_attention(module: Any) -> bool:
    """Whether the module is PEFT's layer for an nn.MultiheadAttention."""
    return is_of_peft(module, "MultiheadAttention")


def output_place(attention: Any) -> Place:
    """Where PEFT's layer for an nn.MultiheadAttention holds the one for its output projection."""
    return Place(attention.get_base_layer(), "out_proj")


def refuse_sharded(peft_model: Any, wanted: str) -> None:
    """Refuse a model whose parameters several ranks hold in parts, other than by FSDP2.

    Communicates nothing.

    Raises:
        ValueError: names a parameter, and what has sharded it.
    """
    for name, parameter in base_model(peft_model).named_parameters():
        if is_unit(peft_model) and is_dtensor(parameter):
            continue
        if not parameter.is_meta and (reason := absence(parameter)) is not None:
            raise ValueError(
                f"{wanted} is not supported here: {name!r} is {reason}, and must be whole. Call "
                "initialize_peft_model before the model is sharded: before a Trainer with FSDP1 or "
                "DeepSpeed trains, without LoraInitCallback; and load the model without zero.Init. "
                "Or call fully_shard (FSDP2) on the layers and on the whole PEFT model"
            )


def is_of_peft(module: Any, *names: str) -> bool:
    """Whether the module is an instance of a class of PEFT, with one of these names if given."""
    return any(
        (cls.__name__ in names or not names) and cls.__module__.split(".")[0] == "peft"
        for cls in type(module).__mro__
    )
