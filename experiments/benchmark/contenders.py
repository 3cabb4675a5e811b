"""Ours and PEFT's: the same request, and the same view of the factors that came out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import lora_init
from experiments.errors import RunFailed

CALIBRATED = ("corda", "eva")
LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}  # PEFT's default of one iteration, for both


@dataclass(frozen=True)
class Request:
    """An adapter as both are asked for it: on every linear layer but the head.

    Attributes:
        exclude: a regular expression of modules to leave out.
        names: the modules spelt out, for PEFT's CorDA, which does nothing for "all-linear".
    """

    task: str | None
    rank: int
    alpha: float
    seed: int
    method: str = "kaiming"
    dora: bool = False
    exclude: str | None = None
    names: tuple[str, ...] | None = None

    def fields(self) -> dict[str, Any]:
        """The settings that have one spelling in both libraries."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.names) if self.names else "all-linear",
            "exclude_modules": None if self.names else self.exclude,
            "init_lora_weights": True if self.method == "kaiming" else self.method,
            "use_dora": self.dora,
            "task_type": self.task,
        }


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one adapted layer: it adds `scaling * B A x`."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


def adapt_ours(
    model: nn.Module, request: Request, calibration: Sequence[dict] | None = None
) -> lora_init.LoraModel:
    return lora_init.get_peft_model(
        model, our_config(request), calibration=calibration, seed=request.seed
    )


def our_config(request: Request) -> lora_init.LoraConfig:
    special = {"loftq_config": dict(LOFTQ)} if request.method == "loftq" else {}
    return lora_init.LoraConfig(**request.fields(), **special)


def our_plan(model: nn.Module, request: Request) -> lora_init.Plan:
    return lora_init.get_peft_model(model, our_config(request), dry_run=True)


def adapt_peft(
    model: nn.Module, request: Request, calibration: Sequence[dict] | None = None
) -> nn.Module:
    """The same by PEFT, with its two methods that take data called as its documentation says."""
    import peft

    torch.manual_seed(request.seed)
    special: dict[str, Any] = {}
    if request.method == "loftq":
        special["loftq_config"] = peft.LoftQConfig(**LOFTQ)
    if request.method == "eva":
        special["eva_config"] = peft.EvaConfig()
    if request.method == "corda":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        special["corda_config"] = CordaConfig(corda_method="ipm")
        request = replace(request, names=spelt_out(model, request))
        config = peft.LoraConfig(**request.fields(), **special)
        preprocess_corda(model, config, run_model=lambda: run_one_by_one(model, calibration))
        return peft.get_peft_model(model, config)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**request.fields(), **special))
    if request.method == "eva":
        peft.initialize_lora_eva_weights(adapted, list(calibration), show_progress_bar=False)
    return adapted


def warm_up(contender: str, request: Request, shape: tuple[int, int], device: torch.device) -> None:
    """Adapt one layer of `shape` (out, in): loads code and work buffers before anything counts."""
    rows, columns = shape
    alone = nn.Sequential(nn.Linear(columns, rows)).to(device)
    method = "kaiming" if request.method in CALIBRATED else request.method
    ADAPT[contender](alone, replace(request, task=None, method=method, names=("0",)))


def spelt_out(model: nn.Module, request: Request) -> tuple[str, ...]:
    plan = our_plan(model, replace(request, method="kaiming"))
    return tuple(target.name for target in plan.targets)


@torch.no_grad()
def run_one_by_one(model: nn.Module, batches: Sequence[dict]) -> None:
    """Every sentence alone and without padding: PEFT's hook of CorDA knows neither."""
    for batch in batches:
        for row, mask in enumerate(batch["attention_mask"]):
            kept = mask.bool()
            model(**{key: value[row : row + 1, kept] for key, value in batch.items()})


ADAPT: dict[str, Callable[..., nn.Module]] = {"ours": adapt_ours, "peft": adapt_peft}
"""By contender: (model, request, calibration) -> adapted model."""


def factors(contender: str, model: nn.Module) -> dict[str, LayerFactors]:
    """The live factors by layer name; writing into them changes the model."""
    if contender == "ours":
        return {
            name: LayerFactors(layer.lora_A, layer.lora_B, layer.scaling)
            for name, layer in model.layers.items()
        }
    return {
        name: LayerFactors(
            module.lora_A["default"].weight,
            module.lora_B["default"].weight,
            module.scaling["default"],
        )
        for name, module in model.get_base_model().named_modules()
        if "default" in getattr(module, "lora_A", ())
    }


@torch.no_grad()
def copy_factors(ours: nn.Module, theirs: nn.Module) -> None:
    """Write our factors into PEFT's model: from there on both compute the same.

    Raises:
        RunFailed: the two adapt different layers, or train different numbers of parameters.
    """
    mine, others = factors("ours", ours), factors("peft", theirs)
    if mine.keys() != others.keys():
        odd = sorted(mine.keys() ^ others.keys())
        raise RunFailed(f"ours and PEFT adapt different layers, e.g. {odd[0]!r}")
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    if counts[0] != counts[1]:
        raise RunFailed(f"ours trains {counts[0]:,} parameters, PEFT {counts[1]:,}")
    for name, layer in mine.items():
        others[name].lora_A.copy_(layer.lora_A)
        others[name].lora_B.copy_(layer.lora_B)
