"""Determine the fully trained modules: those in a file, and those that PEFT selects.

PEFT compares the ends of names: "classifier" also selects `pre_classifier`. When an adapter is
loaded, the content of the file therefore decides. When it is saved, the names are chosen so that
PEFT selects the same modules. If that is impossible, the file also contains the base weights of the
additional modules that PEFT selects.
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
"""The names that PEFT adds to modules_to_save for each task."""


def in_file(
    base: nn.Module, keys: Collection[str], layers: Collection[str], config: LoraConfig
) -> tuple[str, ...]:
    """The fully trained modules in a file: those that PEFT's rule selects and the file contains.

    Warns about modules that the configuration names and the file does not contain.

    Args:
        base: the base model.
        keys: the keys of the file, with the module names of the base.
        layers: the names of the adapted modules.
        config: the settings of the adapter.
    """
    entries = (*(config.modules_to_save or []), *HEADS.get(config.task or "", []))
    found: list[str] = []
    missing: list[str] = []
    for name, module in base.named_modules():
        if not name or not any(name.endswith(entry) for entry in entries):
            continue
        if any(f"{name}.".startswith(f"{outer}.") for outer in found):
            continue
        if any(f"{layer}.".startswith(f"{name}.") for layer in layers):
            continue  # adapted, or contains an adapted module
        if any(key.startswith(f"{PREFIX}{name}.") for key in keys):
            found.append(name)
        elif module.state_dict() and any(name_matches(name, entry) for entry in entries):
            missing.append(name)
    missing = [name for name in missing if not _inside(name, found)]
    if missing:
        warnings.warn(
            f"the adapter file has no tensors for {', '.join(map(repr, missing))}, which "
            f"task_type={config.task!r} or modules_to_save={config.modules_to_save!r} selects. The "
            "weights of the base model are used.",
            stacklevel=5,
        )
    return tuple(found)


def selected_by_peft(
    chosen: Collection[str], others: Collection[str], task: str | None
) -> tuple[list[str], tuple[str, ...]]:
    """The entries of modules_to_save to write, and the additional modules that PEFT selects.

    Args:
        chosen: the full names of the fully trained modules.
        others: the full names of the other modules.
        task: the task of the configuration, for which PEFT adds names.
    """
    heads = PEFT_HEADS.get(task or "", ())
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
