"""How the time of an initialization splits into reading, decomposing, copying and injecting.

The steps are those of `lora_init.initialize.run`. Each is followed by a wait for the device, so the
sum is larger than the undisturbed time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from experiments.gpu.stopwatch import timed
from lora_init.initialize import run

STEPS = {"read": "_input", "decompose": "_computed", "copy": "_settled"}
"""Phases, and the methods of `run._Worker` that they are."""


@contextmanager
def timed_phases(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds by phase of what runs inside. A phase that the library does not have is left out."""
    seconds: dict[str, float] = defaultdict(float)
    worker = getattr(run, "_Worker", None)

    def watched(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            taken, result = timed(lambda: function(*arguments, **named), device)
            seconds[phase] += taken
            return result

        return call

    with ExitStack() as stack:
        for phase, name in STEPS.items():
            if hasattr(worker, name):
                step = watched(phase, getattr(worker, name))
                stack.enter_context(patch.object(worker, name, step))
        yield seconds
