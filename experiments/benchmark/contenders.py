"""The same adapter requested from lora_init and from PEFT."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lora_init
from lora_init.weights.kinds import oriented_weight

from ..errors import RunFailed
from .strategies import LOFTQ_BITS, LOFTQ_ITERATIONS, STRATEGIES, Strategy
from .timing import synchronize


@dataclass(frozen=True)
class Request:
    """An adapter that both libraries are asked for.

    Attributes:
        method: one of `STRATEGIES`.
        names: the layers to adapt; None for all linear layers except the head.
        exclude: a regular expression of layers to skip where `names` is None.
    """

    task: str | None
    rank: int
    alpha: float
    seed: int
    method: str = "kaiming"
    dora: bool = False
    names: tuple[str, ...] | None = None
    exclude: str | None = None

    @property
    def strategy(self) -> Strategy:
        return STRATEGIES[self.method]

    def fields(self) -> dict[str, Any]:
        """Return the settings that both libraries spell alike."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": "all-linear" if self.names is None else list(self.names),
            "exclude_modules": self.exclude if self.names is None else None,
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
class Passes:
    """The seconds that PEFT's own passes over the data take."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = 0.0

    def __call__(self, function: Callable[[], Any]) -> None:
        synchronize(self.device)
        start = time.perf_counter()
        function()
        synchronize(self.device)
        self.seconds += time.perf_counter() - start


def our_config(request: Request) -> lora_init.LoraConfig:
    return lora_init.LoraConfig(init_lora_weights=request.strategy.ours, **request.fields())


def our_plan(model: nn.Module, request: Request) -> lora_init.Plan:
    return lora_init.get_peft_model(model, our_config(request), dry_run=True)


def adapt_ours(
    model: nn.Module, request: Request, calibration: lora_init.Calibration | None = None
) -> lora_init.LoraModel:
    return lora_init.get_peft_model(
        model, our_config(request), calibration=calibration, seed=request.seed, cache=False
    )


def adapt_peft(
    model: nn.Module,
    request: Request,
    calibration: Sequence[dict] = (),
    passes: Passes | None = None,
) -> nn.Module:
    """Adapt a model by PEFT, as its documentation says.

    Args:
        calibration: batches for methods that read data; PEFT passes over them inside this call.
        passes: collects the seconds of those passes.
    """
    import peft

    torch.manual_seed(request.seed)
    fields = request.fields() | {"init_lora_weights": request.strategy.peft}
    passes = passes or Passes()
    if request.method.startswith("corda"):
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        mode = CordaConfig(corda_method=request.method.removeprefix("corda_"))
        config = peft.LoraConfig(**fields, corda_config=mode)
        preprocess_corda(
            model, config, run_model=lambda: passes(lambda: forward_rows(model, calibration))
        )
    elif request.method == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        config = peft.LoraConfig(**fields, lora_ga_config=peft.LoraGAConfig())
        preprocess_loraga(
            model, config, train_step=lambda: passes(lambda: backward(model, calibration))
        )
    elif request.method == "eva":
        fields["init_lora_weights"] = "eva"
        config = peft.LoraConfig(**fields, eva_config=peft.EvaConfig())
        adapted = peft.get_peft_model(model, config)
        peft.initialize_lora_eva_weights(adapted, list(calibration), show_progress_bar=False)
        return adapted
    else:
        if request.method == "loftq":
            fields["loftq_config"] = peft.LoftQConfig(
                loftq_bits=LOFTQ_BITS, loftq_iter=LOFTQ_ITERATIONS
            )
        config = peft.LoraConfig(**fields)
    return peft.get_peft_model(model, config)


@torch.no_grad()
def forward_rows(model: nn.Module, batches: Sequence[dict]) -> None:
    """Run each row alone and without padding, because PEFT's CorDA hook supports neither."""
    for batch in batches:
        for row, mask in enumerate(batch["attention_mask"]):
            kept = mask.bool()
            model(**{key: value[row : row + 1, kept] for key, value in batch.items()})


def backward(model: nn.Module, batches: Sequence[dict]) -> None:
    for batch in batches:
        model(**batch).loss.backward()


def factors(model: nn.Module) -> dict[str, LayerFactors]:
    """Return the live factors of either library by layer name."""
    if isinstance(model, lora_init.LoraModel):
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
    """Copy our factors into PEFT's model, so that both compute the same.

    Raises:
        RunFailed: the two adapt different layers, or train different numbers of parameters.
    """
    mine, others = factors(ours), factors(theirs)
    if mine.keys() != others.keys():
        odd = sorted(mine.keys() ^ others.keys())
        raise RunFailed(f"lora_init and PEFT adapt different layers, e.g. {odd[0]!r}")
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    if counts[0] != counts[1]:
        raise RunFailed(f"lora_init trains {counts[0]:,} parameters, PEFT {counts[1]:,}")
    for name, layer in mine.items():
        others[name].lora_A.copy_(layer.lora_A)
        others[name].lora_B.copy_(layer.lora_B)
