"""The training steps with every decoder block compiled by torch.compile, on two blocks."""

from __future__ import annotations

import importlib.util
import shutil

import torch
from torch import nn

from experiments.gpu.blocks import LLAMA_2_7B, TINY, llama, targets, token_batches
from experiments.gpu.record import brief
from experiments.gpu.stopwatch import rounds, timed
from experiments.gpu.task import Task
from experiments.gpu.training_steps import compare, contenders, stepper

ORDER = ("LoRA", "PiSSA", "PEFT LoRA", "DoRA", "PEFT DoRA")
COMPILE_SECONDS = 8.0  # a guess for the first contender


def run(task: Task) -> None:
    if reason := missing_compiler(task):
        task.record.note(f"compiled steps are missing: {reason}")
        return
    shape, rows, length = (TINY, 2, 16) if task.small else (LLAMA_2_7B, 4, 2048)
    blocks = 1 if task.small else 2
    base = llama(shape, blocks, task.device, spectra=False)
    (batch,) = token_batches(shape, 1, rows, length, task.device)
    models = contenders(task, base, targets(blocks))
    steps, needed = {}, COMPILE_SECONDS
    for name in ORDER:
        if name not in models or not task.affords(name, 1.5 * needed):
            continue
        with task.guarded(name):
            compile_blocks(models[name])
            step = stepper(models[name], batch)
            needed, _ = timed(step, task.device)
            step()
            steps[name] = step
            task.record.row(f"{name}, first step", seconds=needed)
    seconds = rounds(steps, task.device, 2 if task.small else 6)
    for name, taken in seconds.items():
        task.record.row(name, ms=1e3 * taken, tokens=rows * length, blocks=blocks)
    compare(task, seconds)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block alone: equal blocks share their code, so one compilation serves all."""
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            module.compile()


def missing_compiler(task: Task) -> str | None:
    """Why inductor does not work here; None where it does."""
    if task.small:
        return "the small form does not compile"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        return "there is no C compiler, which triton needs"
    try:
        doubled = torch.compile(lambda x: 2 * x + 1)
        doubled(torch.ones(8, device=task.device))
    except Exception as error:
        return brief(error)
    return None
