"""Make the projections of targeted attention modules targets of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from lora_init.config.lora_config import LoraConfig
from lora_init.layers.attention import SplitAttention, join, split
from lora_init.plan.match import select
from lora_init.weights.sharded import is_sharded, reshard


def attention_targets(model: nn.Module, configs: Iterable[LoraConfig]) -> list[str]:
    """The attention modules that the configurations select.

    Raises:
        TypeError: the weights of one are sharded. It cannot be split, because its parameters belong
            to whatever sharded them.
    """
    if not any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        return []
    names = dict.fromkeys(name for config in configs for name in select(model, config).names)
    found = [n for n in names if isinstance(model.get_submodule(n), nn.MultiheadAttention)]
    reshard(model)
    for name in found:
        for path, parameter in model.get_submodule(name).named_parameters(name):
            if is_sharded(parameter):
                raise TypeError(
                    f"target {name!r} is not supported: {path!r} is sharded, and the weights of an "
                    "nn.MultiheadAttention must be plain. Call get_peft_model before the model is "
                    "sharded, or leave it out with exclude_modules."
                )
    return found


@contextmanager
def split_on_success(
    model: nn.Module, names: Iterable[str], *, join_after: bool = False
) -> Iterator[None]:
    """Split attention modules; an error inside joins them again, and so does `join_after`."""
    split(model, names)
    try:
        yield
    except BaseException:
        join(model)
        raise
    if join_after:
        join(model)


def attention_of(model: nn.Module, name: str) -> str | None:
    """The name of the split attention whose projection has this name; None for other modules."""
    parent, _, last = name.rpartition(".")
    is_part = last in ("in_proj", "out_proj")
    return parent if is_part and isinstance(model.get_submodule(parent), SplitAttention) else None
