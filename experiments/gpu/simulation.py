"""The tests' simulated device compared with this one: what raises, and where results are.

A difference means that tests without a GPU miss a fault, or refuse what works. It is listed and
does not count as a wrong result of the library.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from experiments.gpu.operations import OPERATIONS, Operation
from experiments.gpu.task import Task

SIMULATED = Path(__file__).resolve().parents[2] / "tests" / "simulated_device.py"


def run(task: Task) -> None:
    if not SIMULATED.exists():
        task.record.note(f"the comparison is missing: {SIMULATED.name} is not there")
        return
    simulated = loaded(SIMULATED)
    if not task.cuda:
        task.record.note("no CUDA device: only the simulated device ran")
    compared = different = 0
    for group, operations in OPERATIONS.items():
        for name, operation in operations.items():
            theirs = answer(operation, simulated)
            ours = answer(operation, None) if task.cuda else theirs
            compared += 1
            if ours != theirs:
                different += 1
                task.record.row(f"{group}: {name}", device=ours, simulated=theirs)
    task.record.row("all operations", compared=compared, different=different)


def loaded(path: Path) -> ModuleType:
    """The module in a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(operation: Operation, simulated: ModuleType | None) -> str:
    """What the operation does: its result's kind, place, dtype and shape, or that it raises."""
    with nullcontext() if simulated is None else simulated.simulated_cuda():
        c = torch.arange(3.0)
        g = torch.arange(3.0, device="cuda")
        try:
            found = described(operation(g, c))
            if simulated is None:
                torch.cuda.synchronize()  # an error of a kernel arrives late
            return found
        except Exception:  # the type differs between a real device and the simulated one
            return "raises"


def described(result: object) -> str:
    """The answer without its values: draws and decompositions differ."""
    if isinstance(result, list | tuple):
        return ", ".join(described(one) for one in result)
    if isinstance(result, Tensor):
        return f"{result.device.type} {str(result.dtype)[6:]} {tuple(result.shape)}"
    return str(result)
