"""Training steps of lora_init and PEFT on the same blocks: bfloat16 base, float32 factors.

All contenders are in memory and take turns. `frozen` is the forward and backward pass of the base
alone: what a step costs above it is the adapter's.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from experiments.benchmark.peaks import peak_watch
from experiments.gpu.blocks import LLAMA_2_7B, TINY, llama, targets, token_batches
from experiments.gpu.stopwatch import rounds
from experiments.gpu.task import Task
from lora_init import LoraConfig, get_peft_model

RANK = 16
OURS = {
    "LoRA": ("kaiming", False),
    "PiSSA": ("pissa_niter_4", False),
    "DoRA": ("kaiming", True),
    "PiSSA with DoRA": ("pissa_niter_4", True),
}
PEERS = {"PEFT LoRA": False, "PEFT DoRA": True}


def run(task: Task) -> None:
    shape, blocks, rows, length = (TINY, 1, 2, 16) if task.small else (LLAMA_2_7B, 4, 4, 2048)
    base = llama(shape, blocks, task.device, spectra=False)
    names = targets(blocks)
    (batch,) = token_batches(shape, 1, rows, length, task.device)
    models = contenders(task, base, names)
    steps: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, float] = {}
    for name, model in models.items():
        with task.guarded(name):
            step = stepper(model, batch)
            step()  # loads kernels
            watch = peak_watch(task.device)
            step()
            peaks[name] = watch.rise() / 2**30
            steps[name] = step
    count = 2 if task.small else 8
    seconds = rounds(steps, task.device, count)
    for name, taken in seconds.items():
        task.record.row(
            name, ms=1e3 * taken, above_frozen_ms=1e3 * (taken - seconds.get("frozen", 0.0)),
            peak_gib=peaks[name], tokens=rows * length, blocks=blocks,
        )  # fmt: skip
    compare(task, seconds)


def contenders(task: Task, base: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The base and its adapted copies, in training mode."""
    made: dict[str, nn.Module] = {"frozen": copy.deepcopy(base).requires_grad_(False)}
    for name, (method, use_dora) in OURS.items():
        settings = LoraConfig(
            r=RANK, target_modules=names, init_lora_weights=method, use_dora=use_dora
        )
        with task.guarded(name):
            made[name] = get_peft_model(copy.deepcopy(base), settings, cache=False)
    if importlib.util.find_spec("peft") is None:
        task.record.note("PEFT's steps are missing: peft is not installed")
    else:
        import peft

        for name, use_dora in PEERS.items():
            with task.guarded(name), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = peft.LoraConfig(r=RANK, target_modules=names, use_dora=use_dora)
                made[name] = peft.get_peft_model(copy.deepcopy(base), theirs)
    for model in made.values():
        model.train()
        # The first block's inputs need a gradient, as below a trained layer.
        model.get_input_embeddings().register_forward_hook(require_gradient)
    return made


def require_gradient(module: nn.Module, given: tuple, result: torch.Tensor) -> torch.Tensor:
    return result.requires_grad_()


def stepper(model: nn.Module, batch: dict) -> Callable[[], None]:
    """Forward and backward pass, and an update by AdamW where something is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def compare(task: Task, seconds: dict[str, float]) -> None:
    """The ratios that the goals are about."""
    pairs = {
        "PEFT LoRA / LoRA": ("PEFT LoRA", "LoRA"),
        "PEFT DoRA / DoRA": ("PEFT DoRA", "DoRA"),
        "PiSSA / LoRA": ("PiSSA", "LoRA"),
        "PEFT LoRA / PiSSA": ("PEFT LoRA", "PiSSA"),
    }
    for name, (above, below) in pairs.items():
        if above in seconds and below in seconds:
            task.record.row(name, ratio=seconds[above] / seconds[below])
