"""Module names in a file and in a model: the same module, spelled differently.

A key is mapped only if that gives every adapted layer of the file exactly one module. In order:

1. the names are equal;
2. wrappers (torch.compile, DistributedDataParallel, FSDP, activation checkpointing) put a part into
   one of the two names;
3. transformers renamed the modules since, and knows how: its mapping of checkpoint keys;
4. one of the two models is part of the other: one leading part differs, the same for all layers.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_init.adapters.format import FIRST_FACTOR, PREFIX
from lora_init.plan.plan import Plan

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""Names under which wrappers hold the module that they wrap."""

_PARTS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
_NAMED = re.compile(rf"\.({_PARTS})\.(?!(?:weight|bias)$)([^.]+)(\.weight|\.bias)?$")


@dataclass(frozen=True)
class Names:
    """How the adapted layers of a file are called there, by their names in the model.

    Attributes:
        in_file: the former by the latter; wrappers' parts are left out.
    """

    in_file: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, name: str) -> str:
        return self.in_file.get(name, unwrapped(name))


def unwrapped(name: str) -> str:
    """A name without the parts that torch.compile and activation checkpointing add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS[:3])


class PlainNames(dict[str, str]):
    """Names without wrappers, by the names with them."""

    def __missing__(self, name: str) -> str:
        return name  # from before the model was wrapped


def plain_names(model: nn.Module) -> PlainNames:
    """Every module's name as if no wrapper were in the model, by its name."""
    plain = PlainNames({"": ""})
    for name, _ in model.named_modules(remove_duplicate=False):
        if not name:
            continue
        parent, _, last = name.rpartition(".")
        wraps = last in WRAPPERS[:3] or (last == "module" and _wraps(model.get_submodule(parent)))
        plain[name] = plain[parent] if wraps else f"{plain[parent]}.{last}".removeprefix(".")
    return plain


def with_names(plan: Plan, names: Mapping[str, str]) -> Plan:
    """A plan whose modules have other names."""
    targets = (dataclasses.replace(t, name=names.get(t.name, t.name)) for t in plan.targets)
    saved = (names.get(name, name) for name in plan.modules_to_save)
    candidates = dict.fromkeys(names.get(name, name) for name in plan.candidates)
    return dataclasses.replace(
        plan,
        targets=tuple(targets),
        modules_to_save=tuple(saved),
        candidates=tuple(filter(None, candidates)),
    )


def _wraps(module: nn.Module) -> bool:
    return any(
        cls.__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
        for cls in type(module).__mro__
    )


def as_in(base: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Names]:
    """A file's tensors under the names that the base's modules have.

    Raises:
        ValueError: a layer has no module in the base, or could be several; the file holds several
            adapters; two of its tensors get one name.
    """
    tensors = _without_adapter_name(tensors)
    layers = list(dict.fromkeys(layer for key in tensors if (layer := _layer(key)) is not None))
    rename = _renaming(base, layers)
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        new = PREFIX + rename(key.removeprefix(PREFIX))
        if new in renamed:
            raise ValueError(
                f"the adapter file holds {key!r} twice, under two names; keep one of them"
            )
        renamed[new] = value
    return renamed, Names({rename(layer): unwrapped(layer) for layer in layers})


def _layer(key: str) -> str | None:
    """The module's name in the key of a first factor."""
    for ending in FIRST_FACTOR:
        if key.endswith(ending):
            return key.removeprefix(PREFIX).removesuffix(ending)
    return None


def _without_adapter_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys as PEFT saves them, from those of a PEFT model's whole state dict.

    Raises:
        ValueError: tensors of several adapters.
    """
    named = {key: match for key in tensors if (match := _NAMED.search(key))}
    adapters = sorted({match[2] for match in named.values()})
    if len(adapters) > 1:
        raise ValueError(
            f"the file holds several adapters, {', '.join(map(repr, adapters))}; save one with "
            "PEFT's model.save_pretrained(folder, selected_adapters=[name])"
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
    """How keys become the base's.

    Raises:
        ValueError: no way gives every layer one module.
    """
    modules = {name for name, _ in base.named_modules()}
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
    former = _former_names(base)
    if former is not None and all(through_wrappers(former(layer)) in modules for layer in layers):
        return lambda key: through_wrappers(former(key))
    moved = _moved_prefix(map(without_wrappers, layers), single)
    if moved is not None:
        old, new = moved
        warnings.warn(
            f"the adapter's layers are called '{old}…' in the file and '{new}…' in "
            f"{type(base).__name__}; they are taken for the same",
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
        + "; load the base model it was trained on"
    )


def without_wrappers(name: str) -> str:
    """A name without the parts that any wrapper adds; a module called "module" loses its own."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _former_names(base: nn.Module) -> Callable[[str], str] | None:
    """transformers' own renaming of former keys; None where it has none for this model.

    It is imported already if the base is one of its models: this package does not need it.
    """
    inner = base
    while not hasattr(inner, "config") and len(children := list(inner.children())) == 1:
        inner = children[0]
    inner = getattr(inner, "_orig_mod", inner)
    if "transformers" not in sys.modules or not hasattr(inner, "config"):
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        found = get_model_conversion_mapping(inner)
    except (ImportError, AttributeError, TypeError):  # another version, or no model of it
        return None
    renamings = [step for step in found if isinstance(step, WeightRenaming)]
    return lambda key: rename_source_key(without_wrappers(key), renamings, [])[0]


def _moved_prefix(layers: Iterable[str], modules: Mapping[str, str]) -> tuple[str, str] | None:
    """The one leading part to exchange that gives every layer a module; None if there is none.

    The longest common ending decides. Other modules with the same ending make it ambiguous.
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
