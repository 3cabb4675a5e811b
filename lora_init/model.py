"""The model that `get_peft_model` returns: the base model with one adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_init import adapters, injection
from lora_init.config import LoraConfig
from lora_init.diagnostics import InitReport, LayerReport, describe_layer
from lora_init.layers import LoraLayer
from lora_init.plan import Plan


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
        """(trainable, all): as PEFT counts, the untouched originals of saved modules included."""
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
        injection.refuse_adapted(base)
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
