"""Replace modules inside a model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn

from lora_init.injection.transaction import Transaction


def module_paths(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module, by id. A module may be registered under several names."""
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(name)
    return paths


def replace_modules(
    model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]], transaction: Transaction
) -> None:
    """Replace the first module of each pair by the second, everywhere; skip absent modules."""
    pairs = list(pairs)
    paths = module_paths(model) if pairs else {}
    for present, wanted in pairs:
        for path in paths.get(id(present), ()):
            parent, _, attribute = path.rpartition(".")
            owner = model.get_submodule(parent)
            transaction.undo_by(partial(setattr, owner, attribute, present))
            setattr(owner, attribute, wanted)
