"""Ours and PEFT's: the same request, and the same view of the factors that came out of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import lora_init
from experiments.benchmark.strategies import LOFTQ_BITS, LOFTQ_ITERATIONS, STRATEGIES, Strategy
from experiments.benchmark.timing import synchronize
from experiments.errors import RunFailed
from lora_init.weights.kinds import oriented_weight


@dataclass(frozen=True)
class Request:
    """An adapter as both are asked for it: on every linear layer but the head.

    Attributes:
        method: one of `STRATEGIES`.
        exclude: a regular expression of modules to leave out.
        names: the modules spelt out: for a model that is none of transformers', and for PEFT's
            CorDA, which does nothing for "all-linear".
    """

    task: str | None
    rank: int
    alpha: float
    seed: int
    method: str = "kaiming"
    dora: bool = False
    exclude: str | None = None
    names: tuple[str, ...] | None = None

    @property
    def strategy(self) -> Strategy:
        return STRATEGIES[self.method]

    def fields(self) -> dict[str, Any]:
        """The settings that have one spelling in both libraries."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.names) if self.names else "all-linear",
            "exclude_modules": None if self.names else self.exclude,
            "use_dora": self.dora,
            "task_type": self.task,
        }


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one adapted layer, which computes `base x + scaling * B A x`."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    base: Tensor


@dataclass
class Stopwatch:
    """Seconds spent in the calls that are made through it, and their number."""

    seconds: float = 0.0
    calls: int = 0

    def __call__(self, function: Callable[[], Any], device: torch.device) -> Any:
        synchronize(device)
        start = time.perf_counter()
        result = function()
        synchronize(device)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return result


def adapt_ours(
    model: nn.Module,
    request: Request,
    calibration: Sequence[dict] | lora_init.Calibration | None = None,
) -> lora_init.LoraModel:
    return lora_init.get_peft_model(
        model, our_config(request), calibration=calibration, seed=request.seed
    )


def our_config(request: Request) -> lora_init.LoraConfig:
    return lora_init.LoraConfig(init_lora_weights=request.strategy.ours, **request.fields())


def our_plan(model: nn.Module, request: Request) -> lora_init.Plan:
    return lora_init.get_peft_model(model, our_config(request), dry_run=True)


def adapt_peft(
    model: nn.Module,
    request: Request,
    calibration: Sequence[dict] | None = None,
    pass_watch: Stopwatch | None = None,
) -> nn.Module:
    """The same by PEFT, with its methods that take data called as its documentation says.

    Args:
        pass_watch: is given the seconds of CorDA's and LoRA-GA's passes over the data, and the
            number of EVA's forward passes, between which it decomposes.
    """
    import peft

    torch.manual_seed(request.seed)
    watch = Stopwatch() if pass_watch is None else pass_watch
    if request.method in PREPARED:
        return PREPARED[request.method](model, request, calibration, watch)
    special: dict[str, Any] = {}
    if request.method == "loftq":
        special["loftq_config"] = peft.LoftQConfig(
            loftq_bits=LOFTQ_BITS, loftq_iter=LOFTQ_ITERATIONS
        )
    return peft.get_peft_model(model, peft_config(request, **special))


def peft_config(request: Request, **special: Any) -> Any:
    import peft

    fields = request.fields() | special
    return peft.LoraConfig(init_lora_weights=request.strategy.peft, **fields)


def corda_by_peft(
    model: nn.Module, request: Request, calibration: Sequence[dict], watch: Stopwatch
) -> nn.Module:
    import peft
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    request = replace(request, names=spelt_out(model, request))
    mode = CordaConfig(corda_method=request.method.removeprefix("corda_"))
    config = peft_config(request, corda_config=mode)
    device = next(model.parameters()).device
    preprocess_corda(
        model, config,
        run_model=lambda: watch(lambda: run_one_by_one(model, calibration), device),
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def eva_by_peft(
    model: nn.Module, request: Request, calibration: Sequence[dict], watch: Stopwatch
) -> nn.Module:
    import peft

    adapted = peft.get_peft_model(model, peft_config(request, eva_config=peft.EvaConfig()))

    def forward(model: nn.Module, batch: dict) -> None:
        watch.calls += 1
        model(**batch)

    # Its default functions look for a tokenizer's fields; None means that every row counts.
    special = (
        {}
        if "input_ids" in calibration[0]
        else dict.fromkeys(("prepare_model_inputs_fn", "prepare_layer_inputs_fn"))
    )
    peft.initialize_lora_eva_weights(
        adapted, list(calibration), forward_fn=forward, show_progress_bar=False, **special
    )
    return adapted


def lora_ga_by_peft(
    model: nn.Module, request: Request, calibration: Sequence[dict], watch: Stopwatch
) -> nn.Module:
    import peft
    from peft.tuners.lora.loraga import preprocess_loraga

    request = replace(request, names=spelt_out(model, request))
    config = peft_config(request, lora_ga_config=peft.LoraGAConfig())
    device = next(model.parameters()).device

    def train_step() -> None:
        for batch in calibration:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, train_step=lambda: watch(train_step, device))
    return peft.get_peft_model(model, config)


PREPARED: dict[str, Callable[..., nn.Module]] = {
    "corda_ipm": corda_by_peft,
    "corda_kpm": corda_by_peft,
    "eva": eva_by_peft,
    "lora_ga": lora_ga_by_peft,
}
"""PEFT's methods that take data: (model, request, calibration, watch) -> adapted model."""


def warm_up(contender: str, request: Request, shape: tuple[int, int], device: torch.device) -> None:
    """Adapt one layer of `shape` (out, in): loads code and work buffers before anything counts."""
    rows, columns = shape
    alone = nn.Sequential(nn.Linear(columns, rows)).to(device)
    method = "kaiming" if request.strategy.calibration else request.method
    ADAPT[contender](alone, replace(request, task=None, method=method, names=("0",)))


def spelt_out(model: nn.Module, request: Request) -> tuple[str, ...]:
    plan = our_plan(model, replace(request, method="kaiming"))
    return tuple(target.name for target in plan.targets)


@torch.no_grad()
def run_one_by_one(model: nn.Module, batches: Sequence[dict]) -> None:
    """Every row alone and without padding: PEFT's hook of CorDA knows neither."""
    for batch in batches:
        if "attention_mask" not in batch:
            model(**batch)
            continue
        for row, mask in enumerate(batch["attention_mask"]):
            kept = mask.bool()
            model(**{key: value[row : row + 1, kept] for key, value in batch.items()})


ADAPT: dict[str, Callable[..., nn.Module]] = {"ours": adapt_ours, "peft": adapt_peft}
"""By contender: (model, request, calibration) -> adapted model."""


def factors(contender: str, model: nn.Module) -> dict[str, LayerFactors]:
    """The live factors by layer name; writing into them changes the model."""
    if contender == "ours":
        return {
            name: LayerFactors(
                layer.lora_A, layer.lora_B, layer.scaling, oriented_weight(layer.base_layer)
            )
            for name, layer in model.layers.items()
        }
    return {
        name: LayerFactors(
            module.lora_A["default"].weight,
            module.lora_B["default"].weight,
            module.scaling["default"],
            oriented_weight(module.get_base_layer()),
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
