"""Calibration compared with plain forward passes over the same 16k tokens."""

from __future__ import annotations

import torch

from lora_init import LoraConfig, calibrate

from .blocks import LLAMA_1B, TINY, llama, targets, token_batches
from .task import Task
from .waits import LISTED, counted_waits

METHODS = {
    "second moments (eva)": "eva",
    "second moments in float64 (lora_null)": "lora_null",
    "gradients (lora_ga)": "lora_ga",
}


def run(task: Task) -> None:
    shape, count, rows, length = (TINY, 2, 2, 16) if task.small else (LLAMA_1B, 8, 1, 2048)
    model = llama(shape, shape.blocks, task.device, spectra=False)
    batches = token_batches(shape, count, rows, length, task.device)
    tokens = count * rows * length

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    def backward() -> None:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad()

    forward()
    plain = min(task.timed(forward)[0] for _ in range(2))
    task.record.row("plain forward", seconds=plain, tokens=tokens)
    for name, method in METHODS.items():
        if not task.affords(name, 4):
            continue
        with task.guarded(name):
            reference = plain
            if method == "lora_ga":
                backward()
                reference = task.timed(backward)[0]
                task.record.row("plain forward and backward", seconds=reference, tokens=tokens)
            config = LoraConfig(r=8, target_modules=targets(shape.blocks), init_lora_weights=method)
            collect = lambda c=config: calibrate(model, c, batches)  # noqa: E731
            with counted_waits() as waits:
                collect()  # also loads kernels
            with task.peak_memory() as peak:
                seconds, _ = task.timed(collect)
                task.record.row(
                    name,
                    seconds=seconds,
                    passes=seconds / reference,
                    peak_gib=peak(),
                    waits=sum(waits.values()),
                    waits_by_line=dict(waits.most_common(LISTED)),
                )
        task.free()
