"""The sections by name, in the order of the report."""

from __future__ import annotations

from types import ModuleType

from experiments.benchmark import calibration, initialization, injection, memory, steps

SECTIONS: dict[str, ModuleType] = {
    "initialization": initialization,
    "calibration": calibration,
    "injection": injection,
    "memory": memory,
    "steps": steps,
}
