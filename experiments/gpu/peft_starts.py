"""PEFT's own initialization of one block, for the methods that PEFT has.

PEFT's full decompositions take minutes on some devices. They get one layer each and run last.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import LLAMA_2_7B, TINY, llama, targets, token_batches
from .task import Task

CHEAP: dict[str, bool | str] = {
    "random": False,
    "kaiming": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "pissa_niter_4": "pissa_niter_4",
    "olora": "olora",
}
FULL: dict[str, bool | str] = {
    "pissa": "pissa",
    "loftq": "loftq",
    "corda_ipm": "corda",
    "eva": "eva",
    "lora_ga": "lora_ga",
}
LOFTQ = {"loftq_bits": 4, "loftq_iter": 5}
Batches = list[dict[str, Tensor]]


def run(task: Task) -> None:
    if importlib.util.find_spec("peft") is None:
        task.record.note("PEFT's figures are missing: peft is not installed")
        return
    shape, ranks = (TINY, (4,)) if task.small else (LLAMA_2_7B, (16, 128))
    model, names = llama(shape, 1, task.device), targets(1)
    batches = token_batches(shape, 1, 2, 32 if task.small else 1024, task.device)
    cases = [(method, rank, names) for rank in ranks for method in CHEAP]
    if not task.small:
        cases += [(method, ranks[0], names[:1]) for method in FULL]
    for method, rank, layers in cases:
        name = f"{method} r={rank}"
        if not task.affords(name, 2):
            return
        with task.guarded(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = copy.deepcopy(model)
            start = lambda b=base, c=(method, rank, layers): adapt(b, *c, batches)  # noqa: E731
            seconds, _ = task.timed(start)
            whole = seconds * shape.blocks if layers == names else None
            task.record.row(name, layers=len(layers), seconds=seconds, model_seconds=whole)
        task.free()
    task.record.note("methods that read data include PEFT's passes over 2,048 tokens")


def adapt(model: nn.Module, method: str, rank: int, names: list[str], batches: Batches) -> None:
    """Put PEFT's adapter on the model. Data is read as PEFT's documentation describes."""
    import peft

    settings: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": names}
    settings["init_lora_weights"] = (CHEAP | FULL)[method]
    if method == "loftq":
        settings["loftq_config"] = peft.LoftQConfig(**LOFTQ)
    if method == "corda_ipm":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        settings["corda_config"] = CordaConfig(corda_method="ipm")
        preprocess_corda(
            model, peft.LoraConfig(**settings), run_model=lambda: forward(model, batches)
        )
    if method == "eva":
        settings["eva_config"] = peft.EvaConfig()
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
        peft.initialize_lora_eva_weights(adapted, list(batches), show_progress_bar=False)
        return
    if method == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        settings["lora_ga_config"] = peft.LoraGAConfig()
        preprocess_loraga(
            model, peft.LoraConfig(**settings), train_step=lambda: backward(model, batches)
        )
    peft.get_peft_model(model, peft.LoraConfig(**settings))


@torch.no_grad()
def forward(model: nn.Module, batches: Batches) -> None:
    """One row at a time: PEFT's hook for CorDA does not support batches."""
    for batch in batches:
        for ids in batch["input_ids"]:
            model(input_ids=ids[None])


def backward(model: nn.Module, batches: Batches) -> None:
    for batch in batches:
        model(**batch).loss.backward()
