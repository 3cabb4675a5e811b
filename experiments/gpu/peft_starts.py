"""PEFT's own initialization of one block, for the methods that PEFT has.

Its full decompositions take minutes a layer on some devices, so they get one layer, and run last.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings

from experiments.benchmark.contenders import Request, adapt_peft
from experiments.gpu.blocks import LLAMA_2_7B, TINY, llama, targets, token_batches
from experiments.gpu.stopwatch import timed
from experiments.gpu.task import Task

CHEAP = ("random", "kaiming", "gaussian", "orthogonal", "pissa_niter_4", "olora")
FULL = ("pissa", "loftq", "corda_ipm", "eva", "lora_ga")


def run(task: Task) -> None:
    if importlib.util.find_spec("peft") is None:
        task.record.note("PEFT's figures are missing: peft is not installed")
        return
    shape, ranks = (TINY, (4,)) if task.small else (LLAMA_2_7B, (16, 128))
    model = llama(shape, 1, task.device)
    names = tuple(targets(1))
    batches = token_batches(shape, 1, 2, 32 if task.small else 1024, task.device)
    cases = [(method, rank, names) for rank in ranks for method in CHEAP]
    if not task.small:
        cases += [(method, ranks[0], names[:1]) for method in FULL]
    for method, rank, layers in cases:
        name = f"{method} r={rank}"
        if not task.affords(name, 2):
            return
        request = Request("CAUSAL_LM", rank, rank, 0, method, names=layers)
        with task.guarded(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = copy.deepcopy(model)
            start = lambda b=base, r=request: adapt_peft(b, r, batches)  # noqa: E731
            seconds, _ = timed(start, task.device)
            task.record.row(
                name,
                layers=len(layers),
                seconds=seconds,
                model_seconds=seconds * shape.blocks if len(layers) == len(names) else None,
            )
        task.free()
    task.record.note("the methods that read data include PEFT's passes over 2,048 tokens")
