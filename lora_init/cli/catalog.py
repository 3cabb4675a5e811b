"""`lora-init list` and `lora-init show`: the registered methods and their settings."""

from __future__ import annotations

import inspect
from argparse import Namespace
from dataclasses import MISSING, Field, fields
from typing import Any

from lora_init import Initializer, list_initializers
from lora_init.cli.adapter_arguments import method_of
from lora_init.cli.output import emit
from lora_init.plan.tables import render


def list_methods(arguments: Namespace) -> None:
    """Print the methods whose name matches the pattern.

    Raises:
        ValueError: no method matches.
    """
    found = list_initializers(arguments.pattern)
    if not found:
        names = ", ".join(spec.name for spec in list_initializers())
        raise ValueError(
            f"PATTERN={arguments.pattern!r} matches no method: must match one of {names}"
        )
    rows = [
        [s.name, _words(sorted(s.reads)), s.base, _words(s.preserves_output), s.paper]
        for s in found
    ]
    header = ["method", "reads", "base", "keeps the output", "paper"]
    emit(arguments, [_facts(spec) for spec in found], render(header, rows))


def show_method(arguments: Namespace) -> None:
    """Print what a method does, what it reads, and its options with their defaults."""
    spec, settings = method_of(arguments.method, "METHOD=")
    options = [
        [f.name, getattr(f.type, "__name__", f.type), str(getattr(settings, f.name))]
        for f in fields(settings)
    ]
    facts = {name: value for name, value in _facts(spec).items() if name != "options"}
    text = [inspect.getdoc(inspect.getmodule(spec.function)) or spec.name, ""]
    text += [f"{name}: {_words(value)}" for name, value in facts.items()]
    if options:
        text += ["", render(["option", "type", "default"], options)]
    emit(arguments, _facts(spec), "\n".join(text))


def _facts(spec: Initializer) -> dict[str, Any]:
    return {
        "name": spec.name,
        "reads": sorted(spec.reads),
        "base": spec.base,
        "preserves_output": spec.preserves_output,
        "frozen": list(spec.frozen),
        "modules": sorted(spec.modules),
        "control": spec.control,
        "paper": spec.paper,
        "options": {f.name: _default(f) for f in fields(spec.options)},
    }


def _default(field: Field) -> Any:
    if field.default is not MISSING:
        return field.default
    return None if field.default_factory is MISSING else field.default_factory()


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "–"
    return ("yes" if value else "no") if isinstance(value, bool) else value
