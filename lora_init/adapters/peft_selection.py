"""Find modules of a saved adapter that PEFT would not adapt, or would adapt in addition.

transformers 5 stores the weights of all experts in one tensor. For such models, PEFT 0.21 rewrites
`target_modules`: it maps old names of expert layers to parameters of the experts. Dense layers and
shared experts with the same names then get no adapter, and PEFT drops their tensors. A file
therefore names the weights of such layers in `target_parameters`, which PEFT keeps. That excludes
dropout, DoRA and `lora_bias`.

PEFT also renames the keys of an adapter as transformers renames those of old checkpoints. A pattern
that matches a present name too gives a layer that does not exist, and PEFT drops its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lora_init.adapters.keys import former_names
from lora_init.plan.expert_names import pefts_names
from lora_init.plan.left_out import by_reason
from lora_init.plan.match import name_matches, portable_targets
from lora_init.plan.plan import Plan

FUSED = "gate_up_proj"


@dataclass(frozen=True)
class Difference:
    """A module that PEFT would treat differently.

    Attributes:
        name: the name of the module.
        reason: what PEFT does with it.
    """

    name: str
    reason: str


def different_in_peft(model: nn.Module, plan: Plan) -> tuple[Difference, ...]:
    """The modules that only lora_init or only PEFT would adapt with a file of this plan.

    Args:
        model: the base model.
        plan: the plan of the adapter.
    """
    targets = [target.name for target in plan.targets if target.experts is None]
    return _renamed(model, targets) + _reselected(model, plan, targets)


def _renamed(model: nn.Module, targets: list[str]) -> tuple[Difference, ...]:
    """The layers whose keys PEFT renames to those of a layer that the model does not have."""
    renamed = former_names(model)
    if renamed is None:
        return ()
    ending, modules = ".lora_A.weight", dict(model.named_modules())
    found = {name: renamed(name + ending).removesuffix(ending) for name in targets}
    return tuple(
        Difference(name, f"PEFT renames its keys to {other!r} and drops the adapter")
        for name, other in found.items()
        # PEFT undoes a renaming that only removes a leading part.
        if other not in modules and not name.endswith(other)
    )


def _reselected(model: nn.Module, plan: Plan, targets: list[str]) -> tuple[Difference, ...]:
    """The layers that PEFT would take for experts, or that it adds."""
    experts = pefts_names(model)
    if not experts or plan.names_weights:
        return ()
    written = portable_targets(targets, plan.candidates)
    # PEFT replaces a regular expression with the last parts of the matching names.
    entries = written if isinstance(written, list) else {n.rpartition(".")[2] for n in targets}
    mapped = {e: parameter for e in entries if (parameter := _expert(e, experts)) is not None}
    fused = {e.rpartition(".")[2] for e, parameter in mapped.items() if parameter == FUSED}
    if len(fused) == 1:
        reason = f"PEFT refuses the file: it fuses {min(fused)!r} with a name that is not a target"
        return tuple(Difference(name, reason) for name in targets)
    kept = [entry for entry in entries if entry not in mapped]
    there = {n for n in plan.candidates if any(name_matches(n, entry) for entry in kept)}
    lost = [name for name in targets if name not in there]
    gained = [name for name in plan.candidates if name in there and name not in set(targets)]
    return tuple(
        [Difference(name, _dropped(_parameter(name, mapped))) for name in lost]
        + [Difference(name, "PEFT adds an adapter here") for name in gained]
    )


def describe_differences(differences: Iterable[Difference]) -> str:
    """Format the differences, grouped by reason and with collapsed layer numbers."""
    return "; ".join(by_reason((each.name, each.reason) for each in differences))


def _expert(entry: str, experts: dict[str, str]) -> str | None:
    """The parameter to which PEFT maps an entry of target_modules, or None."""
    return next((new for old, new in experts.items() if name_matches(entry, old)), None)


def _dropped(parameter: str) -> str:
    return f"PEFT maps the name to the experts' parameter {parameter!r} and drops the adapter"


def _parameter(name: str, mapped: dict[str, str]) -> str:
    return next(parameter for entry, parameter in mapped.items() if name_matches(name, entry))
