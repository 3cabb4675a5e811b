"""Map the module names in an adapter file to those of a model.

A mapping is used only if it gives each adapted layer of the file exactly one module. These rules
are tried in order:

1. The names are equal.
2. They differ by the parts that wrappers add (torch.compile, DistributedDataParallel, FSDP,
   activation checkpointing).
3. transformers has renamed the modules, and has a mapping of checkpoint keys.
4. All names differ by the same leading part, since one model is part of the other.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora_init.adapters.format import FIRST_FACTOR, PREFIX
from lora_init.plan.parameters import fused_parameters
from lora_init.plan.plan import Plan

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""Names of the attributes in which wrappers store the wrapped module."""

_PARTS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
_NAMED = re.compile(rf"\.({_PARTS})\.(?!(?:weight|bias)$)([^.]+)(\.weight|\.bias)?$")


@dataclass(frozen=True)
class Names:
    """Maps the names of adapted layers in the model to those in the file.

    Attributes:
        in_file: names in the file by names in the model, without the parts of wrappers.
    """

    in_file: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, name: str) -> str:
        return self.in_file.get(name, unwrapped(name))


def unwrapped(name: str) -> str:
    """Remove the parts that torch.compile, FSDP and activation checkpointing add to a name."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS[:3])


class PlainNames(dict[str, str]):
    """Module names without the parts of wrappers, by the names with them."""

    def __missing__(self, name: str) -> str:
        return name  # a name from before the model was wrapped


def plain_names(model: nn.Module) -> PlainNames:
    """The name of each module without the parts of wrappers, by its name."""
    plain = PlainNames({"": ""})
    for name, _ in model.named_modules(remove_duplicate=False):
        if not name:
            continue
        parent, _, last = name.rpartition(".")
        wraps = last in WRAPPERS[:3] or (last == "module" and _wraps(model.get_submodule(parent)))
        plain[name] = plain[parent] if wraps else f"{plain[parent]}.{last}".removeprefix(".")
    return plain


def with_names(plan: Plan, names: Mapping[str, str]) -> Plan:
    """Return a plan whose modules are renamed by the mapping `names`."""
    targets = (
        dataclasses.replace(
            target,
            name=names.get(target.name, target.name),
            attention=target.attention and names.get(target.attention, target.attention),
        )
        for target in plan.targets
    )
    saved = (names.get(name, name) for name in plan.modules_to_save)
    candidates = dict.fromkeys(names.get(name, name) for name in plan.candidates)
    fused = []
    for name in plan.fused:
        module, _, matrix = name.rpartition(".")
        fused.append(f"{names.get(module, module)}.{matrix}")
    return dataclasses.replace(
        plan,
        targets=tuple(targets),
        modules_to_save=tuple(saved),
        candidates=tuple(filter(None, candidates)),
        fused=tuple(fused),
        mapped=tuple(names.get(name, name) for name in plan.mapped),
    )


def _wraps(module: nn.Module) -> bool:
    return any(
        cls.__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
        for cls in type(module).__mro__
    )


def as_in(base: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Names]:
    """Rename the tensors of a file to the module names of the base.

    Raises:
        ValueError: a layer matches no module or several; the file contains several adapters; or two
            tensors get the same name.
    """
    tensors = without_adapter_name(tensors)
    layers = list(dict.fromkeys(layer for key in tensors if (layer := _layer(key)) is not None))
    rename = _renaming(base, layers)
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        new = PREFIX + rename(key.removeprefix(PREFIX))
        if new in renamed:
            raise ValueError(
                f"the adapter file contains {key!r} twice, under two names. Keep one of them."
            )
        renamed[new] = value
    return renamed, Names({rename(layer): unwrapped(layer) for layer in layers})


def _layer(key: str) -> str | None:
    """The name of the module if `key` is that of a first factor, else None."""
    for ending in FIRST_FACTOR:
        if key.endswith(ending):
            return key.removeprefix(PREFIX).removesuffix(ending)
    return None


def without_adapter_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the adapter name from keys of a PEFT model's full state dict, as PEFT does.

    Raises:
        ValueError: the tensors belong to several adapters.
    """
    named = {key: match for key in tensors if (match := _NAMED.search(key))}
    adapters = sorted({match[2] for match in named.values()})
    if len(adapters) > 1:
        raise ValueError(
            f"the file contains several adapters: {', '.join(map(repr, adapters))}. Save one with "
            "PEFT's model.save_pretrained(folder, selected_adapters=[name])."
        )
    plain: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if match := named.get(key):
            key = f"{key[: match.start()]}.{match[1]}{match[3] or ''}"
        elif adapters:
            key = key.replace(f".modules_to_save.{adapters[0]}.", ".")
        plain[key.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")] = value
    return plain


def _renaming(base: nn.Module, layers: list[str]) -> Callable[[str], str]:
    """A function that maps the file's names to those of the base.

    Raises:
        ValueError: no rule gives each layer one module.
    """
    modules = {name for name, _ in base.named_modules()} | fused_parameters(base).keys()
    if all(layer in modules for layer in layers):
        return lambda key: key
    bare: dict[str, list[str]] = {}
    for name in modules:
        bare.setdefault(without_wrappers(name), []).append(name)
    single = {short: names[0] for short, names in bare.items() if len(names) == 1}

    def through_wrappers(key: str) -> str:
        parts = without_wrappers(key).split(".")
        for stop in range(len(parts), 0, -1):
            if (found := single.get(".".join(parts[:stop]))) is not None:
                return ".".join([found, *parts[stop:]])
        return key

    if all(through_wrappers(layer) in modules for layer in layers):
        return through_wrappers
    former = former_names(base)
    if former is not None and all(through_wrappers(former(layer)) in modules for layer in layers):
        return lambda key: through_wrappers(former(key))
    moved = _moved_prefix(map(without_wrappers, layers), single)
    if moved is not None:
        old, new = moved
        warnings.warn(
            f"the adapter's layers are called '{old}…' in the file and '{new}…' in "
            f"{type(base).__name__}; they are assumed to be the same",
            stacklevel=6,
        )

        def from_moved(key: str) -> str:
            bare = without_wrappers(key)
            return through_wrappers(new + bare.removeprefix(old) if bare.startswith(old) else bare)

        return from_moved
    absent = next(layer for layer in layers if through_wrappers(layer) not in modules)
    near = difflib.get_close_matches(absent, modules, n=1, cutoff=0.6)
    raise ValueError(
        f"the adapter has a layer {absent!r}, which {type(base).__name__} does not have"
        + (f" (the nearest is {near[0]!r})" if near else "")
        + ". Load the base model of the training."
    )


def without_wrappers(name: str) -> str:
    """Remove the parts that any wrapper adds to a name, and any other part called "module"."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def former_names(base: nn.Module) -> Callable[[str], str] | None:
    """transformers' renaming of old checkpoint keys; None if it has none for this model.

    If the base is a model of transformers, that library is already imported.
    """
    inner: Any = base
    while not hasattr(inner, "config") and len(children := list(inner.children())) == 1:
        inner = children[0]
    inner = getattr(inner, "_orig_mod", inner)
    if "transformers" not in sys.modules or not hasattr(inner, "config"):
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        found = get_model_conversion_mapping(inner)
    except (
        ImportError,
        AttributeError,
        TypeError,
    ):  # another version of transformers, or another model
        return None
    renamings = [step for step in found if isinstance(step, WeightRenaming)]
    return lambda key: rename_source_key(without_wrappers(key), renamings, [])[0]


def _moved_prefix(layers: Iterable[str], modules: Mapping[str, str]) -> tuple[str, str] | None:
    """The old and new leading part of all layer names; None if it is ambiguous.

    The longest common ending of the first layer decides. If several modules have that ending, the
    answer is ambiguous.
    """
    layers = list(layers)
    first = layers[0].split(".")
    for start in range(len(first) - 1):
        ending = ".".join(first[start:])
        places = [name for name in modules if name == ending or name.endswith("." + ending)]
        if not places:
            continue
        if len(places) > 1:
            return None
        old = ".".join(first[:start]) + "." if start else ""
        new = places[0].removesuffix(ending)
        if all(la.startswith(old) and new + la.removeprefix(old) in modules for la in layers):
            return old, new
        return None
    return None
