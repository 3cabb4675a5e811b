"""Where modules hang in a model, and putting others in their places."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def module_paths(model: nn.Module) -> dict[int, list[str]]:
    """All names of every module: one that is registered twice is replaced in both places."""
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(name)
    return paths


def replace_modules(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Put the second of each pair wherever the first hangs; absent ones are passed over."""
    pairs = list(pairs)
    paths = module_paths(model) if pairs else {}
    for present, wanted in pairs:
        for path in paths.get(id(present), ()):
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, wanted)
