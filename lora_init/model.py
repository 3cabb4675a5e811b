"""`get_peft_model` and the model it returns."""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_init import adapters, injection
from lora_init.allocation import LayerRequest
from lora_init.config import LoraConfig
from lora_init.diagnostics import InitReport, LayerReport, describe_layer, weight_figures
from lora_init.initialization import InitializedLayer, initialize
from lora_init.layers import LoraLayer, TrainedModule
from lora_init.modules import oriented_weight
from lora_init.plan import Plan, make_plan
from lora_init.statistics import Calibration, collect


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    *,
    calibration: Iterable[Any] | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    seed: int = 0,
    dry_run: bool = False,
) -> LoraModel | Plan:
    """Give `model` a low-rank adapter, started as `peft_config.init_lora_weights` says.

    Args:
        model: any torch model; its targeted nn.Linear and Conv1D modules are wrapped in place and
            its parameters frozen. Left untouched if anything fails.
        peft_config: the settings.
        calibration: batches for the methods that need them (corda, eva): any iterable; a mapping
            is passed as ``model(**batch)``. Others do not read it.
        adapter_dtype: of the factors; float32 also for 16-bit bases, where rounded factors cost
            accuracy (METHODS: 2.3e-3 against 4.5e-4).
        device: where the decompositions run, e.g. "cuda"; None: where each weight lives.
        seed: of the initialization. Every layer has a stream of its own, keyed by its name.
        dry_run: return the plan (targets, ranks, parameters, memory, statistics, unmatched keys)
            and change nothing.

    Returns:
        A `LoraModel`, or the `Plan`.

    Raises:
        ValueError, TypeError, NotImplementedError: a setting that cannot be served, with its name,
            its value, what is allowed and what to do; the model is unchanged then.
    """
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__module__}.{type(peft_config).__name__}; pass "
            "a lora_init.LoraConfig (LoraConfig.from_dict(config.to_dict()) converts PEFT's)"
        )
    refuse_adapted(model)
    plan = make_plan(model, peft_config, adapter_dtype)
    if dry_run:
        return plan
    plan.refuse_unmatched()
    spec = plan.initializer
    place = _device(device)
    if plan.calibration is not None and calibration is None:
        raise ValueError(
            f"init_lora_weights={spec.name!r} needs calibration data: pass calibration=<iterable "
            "of batches>, e.g. a list of tokenizer outputs"
        )
    if peft_config.lora_dropout > 0 and spec.base != "keep":
        warnings.warn(
            f"lora_dropout={peft_config.lora_dropout} with {spec.name}: the adapter carries part "
            "of the base's own function, so dropping its inputs disturbs the model from the first "
            "step on; lora_dropout=0.0 is what these methods' papers use",
            stacklevel=2,
        )
    config = copy.deepcopy(peft_config)
    seconds = {}
    start = time.perf_counter()

    statistics = Calibration({})
    if plan.calibration is not None:
        names = [target.name for target in plan.targets]
        statistics = collect(model, names, plan.calibration, calibration, device=place)
    seconds["calibration"] = time.perf_counter() - start

    mark = time.perf_counter()
    if spec.allocate is not None:
        plan = _allocated(plan, config, statistics)
        config = plan.explicit(config)
    seconds["allocation"] = time.perf_counter() - mark

    mark = time.perf_counter()
    initialized = initialize(model, plan, statistics.layers, seed=seed, device=place)
    seconds["initialize"] = time.perf_counter() - mark

    reports = _reports(model, initialized)
    mark = time.perf_counter()
    done = injection.inject(
        model,
        plan,
        {layer.target.name: layer.factors for layer in initialized},
        dropout=config.lora_dropout,
    )
    seconds["inject"] = time.perf_counter() - mark
    seconds["total"] = sum(seconds.values())
    report = InitReport(
        method=spec.name,
        options=dataclasses.asdict(plan.options),
        base=spec.base,
        needs_calibration=plan.calibration is not None,
        seconds=seconds,
        calibration_tokens=statistics.tokens,
        layers=[],
    )
    metrics = {layer.target.name: dict(layer.factors.metrics) for layer in initialized}
    for name, figures in reports.items():
        metrics[name] = figures | metrics[name]
    times = {layer.target.name: layer.seconds for layer in initialized}
    return LoraModel(model, config, plan, done, report, metrics, times)


class LoraModel(nn.Module):
    """A base model with one adapter. Forwards to the base model; made by `get_peft_model`.

    Attributes:
        base_model: the model that was injected.
        peft_config: the settings; after a rank allocation its patterns hold the chosen ranks.
        plan: what was done.
    """

    def __init__(
        self,
        base_model: nn.Module,
        peft_config: LoraConfig,
        plan: Plan,
        done: injection.Injection,
        report: InitReport,
        metrics: dict[str, dict[str, Any]],
        seconds_by_layer: dict[str, float],
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.peft_config = peft_config
        self.plan = plan
        self._injection = done
        self._report = report
        self._metrics = metrics
        self._seconds_by_layer = seconds_by_layer
        if peft_config.base_model_name_or_path is None:
            name = getattr(getattr(base_model, "config", None), "_name_or_path", None)
            peft_config.base_model_name_or_path = name or None
        if peft_config.inference_mode:
            self.requires_grad_(False)
        self.training = base_model.training  # parts that their owner keeps in eval mode stay so

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Whatever this class does not have (generate, config, device, …) is the base model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet: do not recurse
                raise
            return getattr(self.base_model, name)

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """The adapted layers by name."""
        return dict(self._live_injection().layers)

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all): the count of PEFT, which leaves out the copies of saved modules."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trainable, sum(p.numel() for p in self.parameters())

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def init_report(self) -> InitReport:
        """What the initialization did, per layer. Print it, or take its `to_dict()`.

        The figures of a kept or subtracted base are computed now, from the initial factors and the
        restored weights; the model's state of training does not change them.
        """
        adapted = self.layers
        layers = []
        for target in self.plan.targets:
            row = LayerReport(
                name=target.name,
                module_type=target.module_type,
                out_features=target.shape[0],
                in_features=target.shape[1],
                rank=target.rank,
                alpha=target.alpha,
                scaling=target.scaling,
                seconds=self._seconds_by_layer.get(target.name),
            )
            describe_layer(adapted[target.name], row, self._metrics.get(target.name, {}))
            layers.append(row)
        return dataclasses.replace(self._report, layers=layers)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside this context the model computes its original function.

        Raises:
            RuntimeError: where a base was replaced and no copy of the original was kept.
        """
        live = self._live_injection()
        before = injection.set_adapter_enabled(live, False)
        try:
            yield
        finally:
            injection.set_adapter_enabled(live, before)

    def merge_and_unload(self) -> nn.Module:
        """Fold the adapter into the base weights and return the plain base model."""
        model = injection.merge(self.base_model, self._live_injection())
        self._injection = None
        return model

    def unload(self) -> nn.Module:
        """Remove the adapter and return the base model with its original weights.

        Raises:
            RuntimeError: where a base was replaced and no copy of the original was kept.
        """
        model = injection.restore(self.base_model, self._live_injection())
        self._injection = None
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter; see `lora_init.adapters` for the files."""
        adapters.save(Path(folder), self.peft_config, self.plan, self._live_injection())

    @classmethod
    def from_pretrained(
        cls,
        base: nn.Module,
        folder: str | Path,
        *,
        is_trainable: bool = True,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> LoraModel:
        """Load an adapter, written by us or by PEFT, onto its original base model.

        Raises:
            FileNotFoundError, ValueError: no, a damaged, or another base's adapter; `base` is
                unchanged then.
        """
        refuse_adapted(base)
        loaded = adapters.read(Path(folder), base, adapter_dtype)
        loaded.config.inference_mode = not is_trainable
        done = injection.inject(
            base,
            loaded.plan,
            loaded.factors,
            dropout=loaded.config.lora_dropout,
            initial_known=loaded.plan.initializer.base != "keep",
        )
        adapters.fill(done, loaded)
        spec = loaded.plan.initializer
        report = InitReport(
            method=spec.name,
            options=dataclasses.asdict(loaded.plan.options),
            base=spec.base,
            needs_calibration=loaded.plan.calibration is not None,
            seconds={},
            calibration_tokens=0,
            layers=[],
        )
        return cls(base, loaded.config, loaded.plan, done, report, {}, {})

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """A training checkpoint: A, B, A0, B0 of every layer and the modules trained whole."""
        state = {}
        for name, layer in self.layers.items():
            for key in ("lora_A", "lora_B", "initial_lora_A", "initial_lora_B"):
                value = getattr(layer, key)
                if value is not None:
                    state[f"{name}.{key}"] = value.detach()
        for name, trained in self._live_injection().trained.items():
            for key, value in trained.trained_module.state_dict().items():
                state[f"{name}.{key}"] = value
        return state

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint of the same initialization.

        Raises:
            ValueError: other names or shapes, or initial factors that are not this model's: its
                base would not fit them.
        """
        own = self.adapter_state_dict()
        for name in [*own.keys() - state.keys(), *state.keys() - own.keys()]:
            where = "this model" if name in own else "the checkpoint"
            raise ValueError(f"checkpoint: {name!r} is only in {where}; it is another run's")
        for name, value in own.items():
            if value.shape != state[name].shape:
                raise ValueError(
                    f"checkpoint: {name!r} has shape {tuple(state[name].shape)}, this model "
                    f"{tuple(value.shape)}"
                )
            if ".initial_lora_" in name and not torch.equal(value, state[name].to(value)):
                raise ValueError(
                    f"checkpoint: {name!r} differs from this model's initial factor; initialize "
                    "with the same method, seed and calibration data first"
                )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])

    def _live_injection(self) -> injection.Injection:
        if self._injection is None:
            raise RuntimeError("the adapter was unloaded; call get_peft_model again")
        return self._injection


def refuse_adapted(model: nn.Module) -> None:
    """Refuse a model that has an adapter already, ours or PEFT's.

    Raises:
        ValueError: one adapter a model.
    """
    if isinstance(model, LoraModel):
        raise ValueError(
            "the model has an adapter already, and one is all it can have; call "
            "model.unload() or model.merge_and_unload() first and pass what it returns"
        )
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer | TrainedModule):
            raise ValueError(
                f"{name!r} has an adapter already, and one adapter a model is served; call "
                "unload() or merge_and_unload() on the LoraModel that holds it first"
            )
        if type(module).__module__.startswith("peft."):
            raise ValueError(
                f"{name or 'the model'!r} was injected by PEFT; pass the plain base model "
                "(PEFT's model.unload() returns it)"
            )


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: no CUDA device is present; use device=None")
    return place


def _allocated(plan: Plan, config: LoraConfig, statistics: Calibration) -> Plan:
    """The plan with the allocator's ranks."""
    requests = {
        target.name: LayerRequest(target.rank, target.shape, statistics.layers[target.name])
        for target in plan.targets
    }
    ranks = plan.initializer.allocate(requests, plan.options)
    if not any(ranks.values()):
        raise ValueError(
            f"{plan.initializer.name}: no layer's inputs vary over the calibration data, so no "
            "rank was allocated; pass real, varied batches"
        )
    allocated = plan.with_ranks(ranks, config)
    return allocated


def _reports(model: nn.Module, initialized: list[InitializedLayer]) -> dict[str, dict[str, Any]]:
    """Figures that have to be taken before a base is replaced."""
    return {
        layer.target.name: weight_figures(
            oriented_weight(model.get_submodule(layer.target.name)),
            layer.factors.lora_A,
            layer.factors.lora_B,
            layer.target.scaling,
        )
        for layer in initialized
        if layer.factors.replacement is not None
    }
