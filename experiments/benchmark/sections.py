"""The sections by name, in the order of the report."""

from __future__ import annotations

from types import ModuleType

from experiments.benchmark import initialization, injection, memory, steps

SECTIONS: dict[str, ModuleType] = {
    "steps": steps,
    "injection": injection,
    "memory": memory,
    "initialization": initialization,
}
