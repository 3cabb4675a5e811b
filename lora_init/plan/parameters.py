"""Select parameters by name: the fused weights of experts, and those of linear modules and routers.

`target_parameters` follows PEFT: a list of names matches exactly or by dotted suffix. A string is
one regular expression that must match the whole name, which PEFT does not support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from lora_init.config.lora_config import LoraConfig
from lora_init.plan.expert_names import meant, pefts_names
from lora_init.plan.patterns import Expression
from lora_init.weights.experts import FORMER
from lora_init.weights.format import WEIGHT
from lora_init.weights.kinds import class_format, is_linear, is_router


@dataclass(frozen=True)
class Parameters:
    """The parameters that a configuration selects.

    Attributes:
        experts: qualified names of fused parameters, in model order.
        implied: those that no entry of `target_parameters` names.
        doubled: those that replaced two modules, each of which is selected by its old name. Their
            rank and alpha are doubled, as in PEFT.
        modules: qualified names of the linear modules and routers whose weight is selected.
        unmatched: entries of `target_parameters` that matched nothing.
    """

    experts: tuple[str, ...] = ()
    implied: frozenset[str] = frozenset()
    doubled: frozenset[str] = frozenset()
    modules: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()


def fused_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """The module of each fused parameter of experts, by the parameter's name."""
    found = {}
    for name, module in model.named_modules():
        stored = class_format(module)
        if name and stored is not None and stored.operation == "routed":
            found |= {f"{name}.{matrix}": module for matrix in stored.matrices(module)}
    return found


def select_parameters(
    model: nn.Module,
    config: LoraConfig,
    inside: Callable[[str], bool],
    former: Callable[[str], bool] | None,
) -> Parameters:
    """Match `target_parameters` against the names of the model's parameters.

    Args:
        inside: whether a module is part of a module that is trained whole.
        former: whether `target_modules` selects the old name of an expert's module. None for
            "all-linear", which selects all of them.

    Raises:
        ValueError: an entry matches a parameter of another kind; or with experts=True, only one of
            two modules that a parameter replaced is selected.
    """
    fused = {
        name: module for name, module in fused_parameters(model).items()
        if not inside(name.rpartition(".")[0])
    }  # fmt: skip
    implied, doubled = _implied(model, config, fused, former)
    wanted = config.target_parameters
    if wanted is None:
        names = tuple(name for name in fused if name in implied)
        return Parameters(names, frozenset(implied), frozenset(doubled))
    weights = {
        f"{name}.{WEIGHT}": name
        for name, module in model.named_modules()
        if name and (is_linear(module) or is_router(module))
    }
    others = [name for name, _ in model.named_parameters()]
    known = {name: None for name in (*fused, *weights, *others)}
    names = [name for name in known if not inside(name.rpartition(".")[0])]
    if isinstance(wanted, str):
        expression = Expression("target_parameters", wanted)
        hits = {wanted: [name for name in names if expression.fullmatch(name)]}
    else:
        hits = {entry: [name for name in names if _matches(name, entry)] for entry in wanted}
    chosen = {name for found in hits.values() for name in found}
    for entry, found in hits.items():
        for name in found:
            if name not in fused and name not in weights:
                raise ValueError(_other_kind(model, entry, name))
    return Parameters(
        experts=tuple(name for name in fused if name in chosen or name in implied),
        implied=frozenset(implied - chosen),
        doubled=frozenset(doubled - chosen),
        modules=tuple(module for name, module in weights.items() if name in chosen),
        unmatched=tuple(entry for entry, found in hits.items() if not found),
    )


def includes_experts(model: nn.Module, config: LoraConfig) -> bool:
    """Whether "all-linear" selects experts and routers too. The default follows PEFT."""
    return bool(pefts_names(model)) if config.experts is None else config.experts


def _implied(
    model: nn.Module,
    config: LoraConfig,
    fused: Iterable[str],
    former: Callable[[str], bool] | None,
) -> tuple[set[str], set[str]]:
    """The fused parameters that `target_modules` selects, and those of them that are doubled."""
    if not includes_experts(model, config):
        return set(), set()
    implied, doubled = set(), set()
    for name in fused:
        found = "all" if former is None else meant(name, former)
        if found == "some" and config.experts:
            raise ValueError(
                f"target_modules={config.target_modules!r} with experts=True is not supported: "
                f"must select both modules that {name!r} replaced, or none. Name the parameter in "
                "target_parameters."
            )
        if found == "all":
            implied.add(name)
            if any(len(family) > 1 for family in FORMER[name.rpartition(".")[2]]):
                doubled.add(name)
    return implied, doubled


def shortest_parameters(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """The shortest value of target_parameters that selects `chosen` from `names`, also in PEFT.

    Uses the last two name parts ("experts.down_proj") if they suffice, else whole names.
    """
    chosen, names = list(chosen), list(names)
    entries = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in chosen))
    hits = [name for name in names if any(_matches(name, entry) for entry in entries)]
    return entries if sorted(hits) == sorted(chosen) else chosen


def _matches(name: str, entry: str) -> bool:
    return name == entry or name.endswith("." + entry)


def _other_kind(model: nn.Module, entry: str, name: str) -> str:
    owner = name.rpartition(".")[0]
    shape = "×".join(map(str, model.get_parameter(name).shape))
    kind = type(model.get_submodule(owner)).__name__
    return (
        f"target_parameters: {entry!r} matches {name!r} of shape {shape} in a {kind}, which is not "
        "supported: must be the fused weights of experts, or the weight of a linear module or a "
        "router. Leave it out."
    )
