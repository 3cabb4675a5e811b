"""The plan: everything that will happen, decided and checked before any work is done.

`get_peft_model(..., dry_run=True)` returns it, and printing it shows it. Every mistake in the
configuration surfaces here, while the model is still untouched.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_init.config import LoraConfig
from lora_init.eligibility import (
    FLOAT_DTYPES,
    check_module,
    check_sharing,
    check_target_rank,
    extents,
)
from lora_init.modules import module_type, weight_shape
from lora_init.registry import CalibrationRequest, Initializer
from lora_init.tables import render
from lora_init.targets import pattern_value, portable_targets, select


@dataclass(frozen=True)
class Target:
    """One module that gets an adapter: rank r, alpha, and the scaling s they give."""

    name: str
    module_type: str
    shape: tuple[int, int]
    dtype: torch.dtype
    rank: int
    alpha: float
    scaling: float

    @property
    def parameters(self) -> int:
        return self.rank * sum(self.shape)


@dataclass(frozen=True)
class Plan:
    """What a call of `get_peft_model` will do.

    Attributes:
        initializer: the registered method; `options` are its settings.
        targets: the modules to adapt, in model order. After an allocation some may be gone.
        modules_to_save: modules trained whole.
        calibration: the statistics to collect, None when the method needs none.
        unmatched: (setting, entry) pairs that matched nothing in the model.
        candidates: names of all modules that target_modules could have meant.
    """

    initializer: Initializer
    options: Any
    targets: tuple[Target, ...]
    modules_to_save: tuple[str, ...]
    calibration: CalibrationRequest | None
    unmatched: tuple[tuple[str, str], ...]
    candidates: tuple[str, ...]
    adapter_dtype: torch.dtype = torch.float32

    @property
    def parameters(self) -> int:
        """Trainable numbers in the factors, frozen ones excluded."""
        total = 0
        for target in self.targets:
            rows, columns = target.shape
            frozen = self.initializer.frozen
            total += target.rank * (
                ("lora_A" not in frozen) * columns + ("lora_B" not in frozen) * rows
            )
        return total

    @property
    def factor_bytes(self) -> int:
        """Memory of the factors, and of the initial ones that stay with each layer."""
        return 2 * self.adapter_dtype.itemsize * sum(t.parameters for t in self.targets)

    @property
    def statistics_bytes(self) -> int:
        """Upper bound of the second moments' memory: every target with an input of its own."""
        if self.calibration is None:
            return 0
        return 4 * sum(target.shape[1] ** 2 for target in self.targets)

    @property
    def workspace_bytes(self) -> int:
        """The largest layer as float32, in and out of an initializer."""
        return 3 * 4 * max(target.shape[0] * target.shape[1] for target in self.targets)

    def with_ranks(self, ranks: Mapping[str, int], config: LoraConfig) -> Plan:
        """The plan after an allocation: rank 0 leaves, alphas keep each layer's scaling."""
        targets = []
        for target in self.targets:
            rank = ranks[target.name]
            if rank == 0:
                continue
            alpha = target.alpha
            if self.initializer.adjust_alpha(self.options):
                ratio = rank / target.rank
                alpha *= ratio**0.5 if config.use_rslora else ratio
            check_target_rank(target.name, rank, target.shape, self.initializer)
            targets.append(
                dataclasses.replace(
                    target, rank=rank, alpha=alpha, scaling=config.scaling(rank, alpha)
                )
            )
        return dataclasses.replace(self, targets=tuple(targets))

    def explicit(self, config: LoraConfig) -> LoraConfig:
        """`config` with the targets, ranks and alphas spelt out, as PEFT's rules read them.

        The user's own rules are not repeated: PEFT does not find a layer list at a model's root,
        and sorts the keys of a pattern, of which the first that matches wins.
        """
        return dataclasses.replace(
            config,
            target_modules=portable_targets([t.name for t in self.targets], self.candidates),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            rank_pattern={
                f"^{re.escape(t.name)}": t.rank for t in self.targets if t.rank != config.r
            },
            alpha_pattern={
                f"^{re.escape(t.name)}": t.alpha
                for t in self.targets
                if t.alpha != config.lora_alpha
            },
        )

    def refuse_unmatched(self) -> None:
        """Patterns that matched nothing are an error; names in a list only a warning.

        Raises:
            ValueError: for keys of rank_pattern and alpha_pattern.
        """
        for setting, entry in self.unmatched:
            message = (
                f"{setting}: {entry!r} matches none of the {len(self.targets)} targets, e.g. "
                f"{self.targets[0].name!r}; correct it or leave it out"
            )
            if setting in ("rank_pattern", "alpha_pattern"):
                raise ValueError(message)
            warnings.warn(message, stacklevel=3)

    def __str__(self) -> str:
        spec = self.initializer
        needs = "calibration data" if self.calibration is not None else "no calibration data"
        lines = [
            f"{spec.name} {self.options}",
            f"base: {spec.base}; output {'preserved' if spec.preserves_output else 'changed'}; "
            f"needs {needs}",
            f"{len(self.targets)} targets, {self.parameters:,} trainable parameters in factors; "
            f"memory: factors {_mib(self.factor_bytes)}, statistics at most "
            f"{_mib(self.statistics_bytes)}, workspace {_mib(self.workspace_bytes)}",
        ]
        if self.modules_to_save:
            lines.append(f"trained whole: {', '.join(self.modules_to_save)}")
        lines += [f"matches nothing: {setting} {entry!r}" for setting, entry in self.unmatched]
        rows = [
            [
                t.name,
                t.module_type,
                f"{t.shape[0]}×{t.shape[1]}",
                str(t.dtype).removeprefix("torch."),
                t.rank,
                f"{t.alpha:g}",
                f"{t.scaling:g}",
            ]
            for t in self.targets
        ]
        header = ["layer", "type", "out×in", "dtype", "rank", "alpha", "scaling"]
        return "\n".join(lines) + "\n" + render(header, rows)


def make_plan(
    model: nn.Module, config: LoraConfig, adapter_dtype: torch.dtype = torch.float32
) -> Plan:
    """Decide and check everything that can be known before statistics are collected.

    Raises:
        ValueError: see `lora_init.targets.select`; a rank that a layer or the method cannot
            have; a weight that is not served (meta device, sharded, tied under a method that
            changes the base).
        TypeError: a module type that the method does not serve.
    """
    if adapter_dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"adapter_dtype={adapter_dtype!r}; allowed are {', '.join(map(str, FLOAT_DTYPES))}"
        )
    spec, options = config.initializer()
    selection = select(model, config)
    owners = extents(model)
    targets = []
    for name in selection.names:
        module = model.get_submodule(name)
        check_module(model, name, spec)
        check_sharing(name, module, spec, owners)
        shape = weight_shape(module)
        rank = pattern_value("rank_pattern", config.rank_pattern, name, config.r)
        check_target_rank(name, rank, shape, spec)
        alpha = pattern_value("alpha_pattern", config.alpha_pattern, name, config.lora_alpha)
        targets.append(
            Target(
                name=name,
                module_type=module_type(module),
                shape=shape,
                dtype=module.weight.dtype,
                rank=rank,
                alpha=alpha,
                scaling=config.scaling(rank, alpha),
            )
        )
    if config.fan_in_fan_out and all(target.module_type == "Linear" for target in targets):
        warnings.warn(
            "fan_in_fan_out=True, but every target is an nn.Linear, which stores (out, in); the "
            "module's class decides, the setting changes nothing",
            stacklevel=3,
        )
    return Plan(
        initializer=spec,
        options=options,
        targets=tuple(targets),
        modules_to_save=selection.modules_to_save,
        calibration=spec.calibration(options) if spec.calibration else None,
        unmatched=selection.unmatched,
        candidates=selection.candidates,
        adapter_dtype=adapter_dtype,
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
