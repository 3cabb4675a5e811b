"""Training steps of lora_init and PEFT on the same blocks: bfloat16 base, float32 factors.

All contenders are in memory and alternate. `frozen` is the forward and backward pass of the base
alone: the rest of a step's time is the adapter's.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_init import LoraConfig, get_peft_model

from .blocks import LLAMA_2_7B, TINY, llama, targets, token_batches
from .task import Task

RANK = 16
OURS = {
    "LoRA": ("kaiming", False),
    "PiSSA": ("pissa_niter_4", False),
    "DoRA": ("kaiming", True),
    "PiSSA with DoRA": ("pissa_niter_4", True),
}
PEERS = {"PEFT LoRA": False, "PEFT DoRA": True}
RATIOS = (
    ("PEFT LoRA", "LoRA"), ("PEFT DoRA", "DoRA"), ("PiSSA", "LoRA"), ("PEFT LoRA", "PiSSA"),
)  # fmt: skip


def run(task: Task) -> None:
    shape, blocks, rows, length = (TINY, 1, 2, 16) if task.small else (LLAMA_2_7B, 4, 4, 2048)
    base = llama(shape, blocks, task.device, spectra=False)
    (batch,) = token_batches(shape, 1, rows, length, task.device)
    steps: dict[str, Callable[[], None]] = {}
    peaks: dict[str, float | None] = {}
    for name, model in contenders(task, base, targets(blocks)).items():
        with task.guarded(name):
            step = stepper(model, batch)
            step()  # loads kernels
            with task.peak_memory() as peak:
                step()
                peaks[name] = peak()
            steps[name] = step
    seconds = alternated(task, steps, 2 if task.small else 8)
    frozen = seconds.get("frozen", 0.0)
    for name, taken in seconds.items():
        extra = {"above_frozen_ms": 1e3 * (taken - frozen), "peak_gib": peaks[name]}
        task.record.row(name, ms=1e3 * taken, **extra, tokens=rows * length, blocks=blocks)
    record_ratios(task, seconds)


def contenders(task: Task, base: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The base and its adapted copies, in training mode."""
    made: dict[str, nn.Module] = {"frozen": copy.deepcopy(base).requires_grad_(False)}
    for name, (method, use_dora) in OURS.items():
        config = LoraConfig(
            r=RANK, target_modules=names, init_lora_weights=method, use_dora=use_dora
        )
        with task.guarded(name):
            made[name] = get_peft_model(copy.deepcopy(base), config, cache=False)
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
        # The first block's inputs need a gradient, as they do above a trained layer.
        model.get_input_embeddings().register_forward_hook(
            lambda module, given, result: result.requires_grad_()
        )
    return made


def stepper(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward and backward pass, and an update by AdamW if anything is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def alternated(task: Task, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median seconds of each call. They alternate, so that a clock change affects all."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            taken[name].append(task.timed(calls[name])[0])
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def record_ratios(task: Task, seconds: dict[str, float]) -> None:
    """The ratios of step times that have goals."""
    for above, below in RATIOS:
        if above in seconds and below in seconds:
            task.record.row(f"{above} / {below}", ratio=seconds[above] / seconds[below])
