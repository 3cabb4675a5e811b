"""Which modules are trained whole: what a file holds, and what PEFT's rule selects.

PEFT compares the raw ends of names: "classifier" also selects `pre_classifier`, "norm" every name
that ends in "norm". So the file decides when an adapter is loaded. What is written selects the same
modules under PEFT's rule; where no list of names can, the file holds the base's own tensors of the
modules that PEFT will look for besides.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable

from torch import nn

from lora_init.adapters.format import PREFIX
from lora_init.config.lora_config import HEADS, LoraConfig
from lora_init.plan.match import name_matches

PEFT_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The names that PEFT adds to modules_to_save by itself."""


def in_file(
    base: nn.Module, keys: Collection[str], layers: Collection[str], config: LoraConfig
) -> tuple[str, ...]:
    """The modules whose tensors the file holds, among all that PEFT's rule could have selected.

    Warns of a module that the configuration names and the file does not hold.

    Args:
        keys: of the file, as the base's modules are called.
        layers: the adapted modules.
    """
    entries = (*(config.modules_to_save or []), *HEADS.get(config.task, []))
    found: list[str] = []
    missing: list[str] = []
    for name, module in base.named_modules():
        if not name or not any(name.endswith(entry) for entry in entries):
            continue
        if any(f"{name}.".startswith(f"{outer}.") for outer in found):
            continue
        if any(f"{layer}.".startswith(f"{name}.") for layer in layers):
            continue  # adapted, or it holds what is adapted
        if any(key.startswith(f"{PREFIX}{name}.") for key in keys):
            found.append(name)
        elif module.state_dict() and any(name_matches(name, entry) for entry in entries):
            missing.append(name)
    missing = [name for name in missing if not _inside(name, found)]
    if missing:
        warnings.warn(
            f"the adapter file holds no tensors of {', '.join(map(repr, missing))}, which "
            f"task_type={config.task!r} or modules_to_save={config.modules_to_save!r} would train; "
            "the base model's own are used",
            stacklevel=5,
        )
    return tuple(found)


def selected_by_peft(
    chosen: Collection[str], others: Collection[str], task: str | None
) -> tuple[list[str], tuple[str, ...]]:
    """The entries of modules_to_save to write, and the modules that PEFT selects besides.

    Args:
        chosen: full names of the modules trained whole.
        others: full names of the modules outside of them.
        task: the configuration's task, for which PEFT adds names by itself.
    """
    heads = PEFT_HEADS.get(task, ())
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in chosen))
    best: tuple[list[str], tuple[str, ...]] | None = None
    for entries in (short, list(chosen)):
        besides = _ending_in(others, [*entries, *heads])
        if best is None or len(besides) < len(best[1]):
            best = entries, besides
    return best


def _ending_in(names: Iterable[str], entries: Collection[str]) -> tuple[str, ...]:
    found: list[str] = []
    for name in names:
        if any(name.endswith(entry) for entry in entries) and not _inside(name, found):
            found.append(name)
    return tuple(found)


def _inside(name: str, others: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)
