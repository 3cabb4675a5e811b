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
    check_target_rank,
    extents,
    sharers,
)
from lora_init.modules import module_type, weight_description, weight_shape
from lora_init.packed import is_packed
from lora_init.registry import CalibrationRequest, Initializer
from lora_init.tables import render
from lora_init.targets import pattern_value, portable_targets, select

QUANTIZED_BASES = ("in_forward", "requantize")


@dataclass(frozen=True)
class Target:
    """One module that gets an adapter.

    Attributes:
        shape: (out, in) as `lora_init.modules` sees it.
        dtype: of the weight, or what a packed one holds ("nf4/64").
        rank, alpha, scaling: r, alpha and the s they give.
        quantized: whether the weight is packed.
        shared_with: parameters of other modules that lie in the same memory.
    """

    name: str
    module_type: str
    shape: tuple[int, int]
    dtype: str
    rank: int
    alpha: float
    scaling: float
    quantized: bool = False
    shared_with: tuple[str, ...] = ()

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
        quantized_base: what a subtracting method does to packed weights: "in_forward" leaves them
            and subtracts in the forward pass, "requantize" packs the residual.
        trained_biases: names of the bias parameters that are trained, as `bias` says.
        bias, dropout, use_dora, lora_bias: as in the configuration.
    """

    initializer: Initializer
    options: Any
    targets: tuple[Target, ...]
    modules_to_save: tuple[str, ...]
    calibration: CalibrationRequest | None
    unmatched: tuple[tuple[str, str], ...]
    candidates: tuple[str, ...]
    adapter_dtype: torch.dtype = torch.float32
    quantized_base: str = "in_forward"
    trained_biases: tuple[str, ...] = ()
    bias: str = "none"
    dropout: float = 0.0
    use_dora: bool = False
    lora_bias: bool = False

    @property
    def parameters(self) -> int:
        """Trainable numbers in the factors (frozen ones excluded), magnitudes and LoRA biases."""
        total = 0
        frozen = self.initializer.frozen
        for target in self.targets:
            rows, columns = target.shape
            total += target.rank * (
                ("lora_A" not in frozen) * columns + ("lora_B" not in frozen) * rows
            )
            total += (self.use_dora + self.lora_bias) * rows
        return total

    @property
    def requantizes(self) -> bool:
        """Whether packed weights take the residual of a subtracting method."""
        return self.initializer.base == "subtract" and self.quantized_base == "requantize"

    @property
    def replaced(self) -> tuple[Target, ...]:
        """Targets whose base weight becomes another, quantised one."""
        if self.initializer.base == "replace":
            return self.targets
        return tuple(t for t in self.targets if t.quantized) if self.requantizes else ()

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
        kept = {f"{target.name}.bias" for target in targets}
        biases = self.trained_biases
        if self.bias == "lora_only":
            biases = tuple(name for name in biases if name in kept)
        return dataclasses.replace(self, targets=tuple(targets), trained_biases=biases)

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

    def refuse_unmatched(self, *, allowed: bool = False) -> None:
        """Patterns that matched nothing are an error; names in a list only a warning.

        Args:
            allowed: warn of the patterns too.

        Raises:
            ValueError: for keys of rank_pattern and alpha_pattern.
        """
        for setting, entry in self.unmatched:
            message = (
                f"{setting}: {entry!r} matches none of the {len(self.targets)} targets, e.g. "
                f"{self.targets[0].name!r}; correct it or leave it out"
            )
            if setting in ("rank_pattern", "alpha_pattern") and not allowed:
                raise ValueError(message + ", or pass allow_unmatched=True")
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
        variants = [name for name in ("use_dora", "lora_bias") if getattr(self, name)]
        if variants:
            lines.append(f"with {', '.join(variants)}")
        if self.trained_biases:
            lines.append(f"biases trained: {len(self.trained_biases)} ({self.bias})")
        shared = [t.name for t in self.targets if t.shared_with]
        if shared and spec.base != "keep":
            how = "get a weight of their own" if spec.base == "replace" else "stay as they are"
            lines.append(f"share their weight with another module, and {how}: {', '.join(shared)}")
        if self.modules_to_save:
            lines.append(f"trained whole: {', '.join(self.modules_to_save)}")
        lines += [f"matches nothing: {setting} {entry!r}" for setting, entry in self.unmatched]
        rows = [
            [
                t.name,
                t.module_type,
                f"{t.shape[0]}×{t.shape[1]}",
                t.dtype,
                t.rank,
                f"{t.alpha:g}",
                f"{t.scaling:g}",
            ]
            for t in self.targets
        ]
        header = ["layer", "type", "out×in", "dtype", "rank", "alpha", "scaling"]
        return "\n".join(lines) + "\n" + render(header, rows)


def make_plan(
    model: nn.Module,
    config: LoraConfig,
    adapter_dtype: torch.dtype = torch.float32,
    *,
    quantized_base: str = "in_forward",
    any_rank: bool = False,
) -> Plan:
    """Decide and check everything that can be known before statistics are collected.

    Args:
        any_rank: do not check the ranks: an adapter from a file needs no initialization.

    Raises:
        ValueError: see `lora_init.targets.select`; a rank that a layer or the method cannot
            have; a weight that is not served (meta device, sharded).
        TypeError: a module type that the method does not serve.
    """
    if adapter_dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"adapter_dtype={adapter_dtype!r}; allowed are {', '.join(map(str, FLOAT_DTYPES))}"
        )
    if quantized_base not in QUANTIZED_BASES:
        raise ValueError(
            f"quantized_base={quantized_base!r}; allowed are {', '.join(QUANTIZED_BASES)}"
        )
    spec, options = config.initializer()
    selection = select(model, config)
    owners = extents(model)
    targets = []
    for name in selection.names:
        module = model.get_submodule(name)
        check_module(model, name, spec)
        shape = weight_shape(module)
        rank = pattern_value("rank_pattern", config.rank_pattern, name, config.r)
        if not any_rank:
            check_target_rank(name, rank, shape, spec)
        alpha = pattern_value("alpha_pattern", config.alpha_pattern, name, config.lora_alpha)
        targets.append(
            Target(
                name=name,
                module_type=module_type(module),
                shape=shape,
                dtype=weight_description(module),
                rank=rank,
                alpha=alpha,
                scaling=config.scaling(rank, alpha),
                quantized=is_packed(module),
                shared_with=sharers(name, module, owners),
            )
        )
    if config.fan_in_fan_out and all(target.module_type == "Linear" for target in targets):
        warnings.warn(
            "fan_in_fan_out=True, but every target is an nn.Linear, which stores (out, in); the "
            "module's class decides, the setting changes nothing",
            stacklevel=3,
        )
    for name in selection.modules_to_save:
        inside = dict(model.get_submodule(name).named_modules(prefix=name))
        quantized = [path for path, module in inside.items() if is_packed(module)]
        if quantized:
            raise ValueError(
                f"modules_to_save: {quantized[0]!r} is a {module_type(inside[quantized[0]])}, "
                "whose codes cannot be trained; load the model with "
                f"llm_int8_skip_modules=[{name.rpartition('.')[2]!r}] in its quantization_config"
            )
    embeddings = [target.name for target in targets if target.module_type == "Embedding"]
    if config.lora_bias and embeddings:
        raise ValueError(
            f"lora_bias=True with the Embedding {embeddings[0]!r}: an embedding has no bias; leave "
            "it out (exclude_modules), or lora_bias=False"
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
        quantized_base=quantized_base,
        trained_biases=_trained_biases(model, config.bias, targets, selection.modules_to_save),
        bias=config.bias,
        dropout=config.lora_dropout,
        use_dora=config.use_dora,
        lora_bias=config.lora_bias,
    )


def _trained_biases(
    model: nn.Module, bias: str, targets: list[Target], modules_to_save: tuple[str, ...]
) -> tuple[str, ...]:
    """Which bias parameters are trained; those of modules trained whole are trained there."""
    if bias == "none":
        return ()
    names = [name for name, _ in model.named_parameters()]
    if bias == "lora_only":
        adapted = {f"{target.name}.bias" for target in targets}
        return tuple(name for name in names if name in adapted)
    whole = tuple(f"{name}." for name in modules_to_save)
    return tuple(n for n in names if n.rpartition(".")[2] == "bias" and not n.startswith(whole))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
