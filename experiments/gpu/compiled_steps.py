"""The training steps with every decoder block compiled by torch.compile, on two blocks."""

from __future__ import annotations

import importlib.util
import shutil

import torch

from .blocks import LLAMA_2_7B, llama, targets, token_batches
from .record import brief
from .task import Task
from .training_steps import alternated, contenders, record_ratios, stepper

ORDER = ("LoRA", "PiSSA", "PEFT LoRA", "DoRA", "PEFT DoRA")
COMPILE_SECONDS = 8.0  # an estimate for the first contender
BLOCKS, ROWS, LENGTH = 2, 4, 2048


def run(task: Task) -> None:
    if reason := missing_compiler(task):
        task.record.note(f"compiled steps are missing: {reason}")
        return
    base = llama(LLAMA_2_7B, BLOCKS, task.device, spectra=False)
    (batch,) = token_batches(LLAMA_2_7B, 1, ROWS, LENGTH, task.device)
    models = contenders(task, base, targets(BLOCKS))
    steps, needed = {}, COMPILE_SECONDS
    for name in ORDER:
        if name not in models or not task.affords(name, 1.5 * needed):
            continue
        with task.guarded(name):
            for module in models[name].modules():
                if type(module).__name__ == "LlamaDecoderLayer":
                    module.compile()  # equal blocks share the compiled code
            step = stepper(models[name], batch)
            needed, _ = task.timed(step)
            step()
            steps[name] = step
            task.record.row(f"{name}, first step", seconds=needed)
    seconds = alternated(task, steps, 6)
    for name, taken in seconds.items():
        task.record.row(name, ms=1e3 * taken, tokens=ROWS * LENGTH, blocks=BLOCKS)
    record_ratios(task, seconds)


def missing_compiler(task: Task) -> str | None:
    """The reason why torch.compile does not work here; None if it does."""
    if task.small:
        return "the small form does not compile"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        return "triton needs a C compiler, which is missing"
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=task.device))
    except Exception as error:
        return brief(error)
    return None
