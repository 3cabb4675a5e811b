"""The parts of the command in the order in which they run, and their time limits."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from ..config.location import qualified
from .task import Task

TOTAL_SECONDS = 480.0
"""The limit of all parts together, process starts included. The single limits add up to more,
because the first import of torch may read gigabytes from a slow disk."""


@dataclass(frozen=True)
class Part:
    """A function `run(task)` in a module of this package.

    Attributes:
        seconds: the time limit of its process.
        about: what it finds out, for the report.
    """

    name: str
    module: str
    seconds: float
    about: str

    @property
    def run(self) -> Callable[[Task], None]:
        return importlib.import_module(qualified(f"gpu.{self.module}")).run


PARTS = (
    Part("device", "device_facts", 40, "The device, its software, and its settings."),
    Part("agreement", "agreement", 110, "The same adapters as on the CPU, and their unloading."),
    Part("methods", "methods", 125, "All methods on Llama-2-7B's shapes in bfloat16."),
    Part("training", "training_steps", 45, "Training steps compared with PEFT's, eager."),
    Part("calibration", "calibration_pass", 35, "Calibration compared with plain forward passes."),
    Part("simulation", "simulation", 30, "The simulated device of the tests against this one."),
    Part("compiled", "compiled_steps", 45, "The training steps under torch.compile."),
)


def selected(names: list[str] | None) -> list[Part]:
    """The parts with these names, in the order of `PARTS`; all for None.

    Raises:
        ValueError: a name is unknown.
    """
    known = [part.name for part in PARTS]
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"--parts={name} is not supported: must be one of {', '.join(known)}. "
                "Omit --parts to run all of them."
            )
    return [part for part in PARTS if names is None or part.name in names]
