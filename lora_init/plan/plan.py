"""The plan: all decisions about an adapter, made and checked before the model is changed.

`get_peft_model(..., dry_run=True)` returns the plan; `print` displays it. `lora_init.plan.make`
builds it and reports mistakes in the configuration.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lora_init.config.lora_config import LoraConfig
from lora_init.linalg.cores import largest_together, stack_size
from lora_init.linalg.moments import sums_bytes
from lora_init.plan.check import check_target_rank
from lora_init.plan.left_out import LeftOut, described
from lora_init.plan.match import portable_targets
from lora_init.plan.parameters import shortest_parameters
from lora_init.plan.tables import render
from lora_init.registry import (
    OVERSAMPLING,
    POWERS,
    CalibrationRequest,
    Initializer,
    sums_dtype,
)
from lora_init.weights.format import FORMATS, WEIGHT


@dataclass(frozen=True)
class Target:
    """One matrix that gets an adapter: a module's weight, or a parameter of fused experts.

    Attributes:
        name: the name of the module; for experts, that of the parameter, such as
            "model.layers.0.mlp.experts.down_proj".
        shape: (out, in), as in `lora_init.weights.format`. For experts, that of one expert.
        dtype: the weight's dtype, or the format of a packed weight ("nf4/64").
        rank, alpha, scaling: r, alpha and the resulting factor s.
        quantized: whether the weight is packed.
        shared_with: parameters of other modules that use the same memory.
        exact: whether the module computes the product with its stored weight. False if a
            quantizer's forward rounds inputs or weights; the base weight is then not edited.
        planned_rank: r before rank allocation; None without allocation.
        groups: how many blocks of rows have their own inputs and their own rank / groups.
        attention: the name of the attention module whose projection this is; None for others.
        matrix: the name of the matrix in its module.
        experts: the number of experts of a fused parameter; None for one matrix.
        expert: the number of this expert, in a plan that lists the matrices of all experts.
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
    exact: bool = True
    planned_rank: int | None = None
    groups: int = 1
    attention: str | None = None

    @property
    def selected(self) -> str:
        """The name by which target_modules and patterns select this target."""
        return self.attention or self.name

    matrix: str = WEIGHT
    experts: int | None = None
    expert: int | None = None

    @property
    def module(self) -> str:
        """The name of the module that holds the matrix."""
        parts = (self.matrix != WEIGHT) + (self.expert is not None)
        return self.name.rsplit(".", parts)[0]

    @property
    def parameters(self) -> int:
        rows, columns = self.shape
        return (self.experts or 1) * self.rank * (rows // self.groups + columns)

    @property
    def has_fixed_rank(self) -> bool:
        """Whether rank allocation keeps the planned rank, because one rank is for all matrices.

        A file has one rank for all experts of a parameter, or all groups of a convolution.
        """
        return self.experts is not None or self.groups > 1

    def single(self) -> Iterator[Target]:
        """Each expert's matrix as a target "<name>.<number>"; the target itself if it is one."""
        if self.experts is None:
            yield self
            return
        for expert in range(self.experts):
            yield dataclasses.replace(
                self, name=f"{self.name}.{expert}", experts=None, expert=expert
            )


@dataclass(frozen=True)
class Plan:
    """What a call of `get_peft_model` will do.

    Attributes:
        initializer: the registered method; `options` holds its settings.
        targets: the modules to adapt, in model order. Rank allocation may remove some.
        modules_to_save: the modules to train whole.
        calibration: the statistics to collect; None if the method needs none.
        unmatched: (setting, entry) pairs that matched nothing in the model.
        candidates: names of all modules that target_modules can match.
        quantized_base: how a subtracting method treats packed weights. "in_forward" keeps them and
            subtracts in the forward pass; "requantize" quantizes the residual.
        calibration_memory: as for `get_peft_model`.
        trained_biases: names of the bias parameters that are trained.
        bias, dropout, use_dora, lora_bias: as in the configuration.
        left_out: linear weights that get no adapter, with the reasons.
        fused: names of all fused parameters of experts in the model.
        mapped: the targets whose names PEFT would take for those of experts.
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
    calibration_memory: int | None = None
    trained_biases: tuple[str, ...] = ()
    bias: str = "none"
    dropout: float = 0.0
    use_dora: bool = False
    lora_bias: bool = False
    left_out: tuple[LeftOut, ...] = ()
    fused: tuple[str, ...] = ()
    mapped: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of trainable values in factors (without frozen ones), magnitudes, LoRA biases."""
        total = 0
        frozen = self.initializer.frozen
        for target in self.targets:
            rows, columns = target.shape
            values = target.rank * (
                ("lora_A" not in frozen) * columns
                + ("lora_B" not in frozen) * rows // target.groups
            )
            values += self.initializer.has_core * target.rank**2
            values += (self.use_dora + self.lora_bias) * rows
            total += (target.experts or 1) * values
        return total

    @cached_property
    def matrices(self) -> tuple[Target, ...]:
        """The targets, with one for each expert of a fused parameter."""
        return tuple(one for target in self.targets for one in target.single())

    def in_matrices(self) -> Plan:
        """The plan whose targets are the `matrices`, for calibration and initialization."""
        return dataclasses.replace(self, targets=self.matrices)

    @property
    def requantizes(self) -> bool:
        """Whether packed weights are replaced by the quantized residual."""
        return self.initializer.base == "subtract" and self.quantized_base == "requantize"

    def requantizes_base(self, target: Target) -> bool:
        return self.requantizes and target.quantized

    def reads_weight(self, target: Target) -> bool:
        """Whether the method reads the weight's values."""
        reads = self.initializer.reads | self.options.also_reads()
        return "weight" in reads or self.requantizes_base(target)

    @property
    def replaced(self) -> tuple[Target, ...]:
        """Targets whose base weight is replaced by a quantized one."""
        if self.initializer.base == "replace":
            return self.targets
        return tuple(t for t in self.targets if t.quantized) if self.requantizes else ()

    @property
    def factor_bytes(self) -> int:
        """Memory of the factors, including the initial factors that each layer keeps."""
        return 2 * self.adapter_dtype.itemsize * sum(t.parameters for t in self.targets)

    @property
    def statistics_bytes(self) -> int:
        """Memory of the statistics: exact for gradients, an upper bound for second moments."""
        if self.calibration is None:
            return 0
        sketches = self.sketch_bytes if self.sketches_gradients else None
        gradients = self.gradient_bytes if sketches is None else sketches
        sets = len(self.calibration.sets) or 1
        inputs = sets * sum(self.input_bytes(target) for target in self.matrices)
        return self.calibration.gradients * gradients + self.calibration.inputs * inputs

    @property
    def gradient_bytes(self) -> int:
        """Memory of all whole gradients."""
        return 4 * sum(target.shape[0] * target.shape[1] for target in self.matrices)

    @property
    def sketch_bytes(self) -> int | None:
        """Memory of sketches of all gradients; None if the method reads whole gradients."""
        if self.sketch_sizes is None:
            return None
        return 4 * sum(self.sketch_sizes[t.name] * sum(t.shape) for t in self.matrices)

    @property
    def sketch_sizes(self) -> dict[str, int] | None:
        """By target, how many triplets a gradient's sketch holds; None if it cannot be sketched."""
        plain = self.calibration is not None and not self.calibration.inputs
        grouped = any(target.groups > 1 for target in self.targets)
        if not plain or grouped or self.initializer.allocates:
            return None
        sizes = {}
        for target in self.matrices:
            if (directions := self.directions(target)) is None:
                return None
            sizes[target.name] = min(directions + OVERSAMPLING, *target.shape)
        return sizes

    @property
    def sketches_gradients(self) -> bool:
        """Whether the gradients exceed `calibration_memory` and sketches take less."""
        limit, sketches = self.calibration_memory, self.sketch_bytes
        if limit is None or sketches is None:
            return False
        return limit < self.gradient_bytes and sketches < self.gradient_bytes

    def input_bytes(self, target: Target) -> int:
        """Memory of the sums over one target's inputs, of all its experts or groups."""
        requests = [] if self.calibration is None else [self.calibration]
        count = (target.experts or 1) * target.groups
        return count * sums_bytes(target.shape[1], sums_dtype(requests))

    @property
    def passes(self) -> int:
        """Upper bound of the number of calibration passes under `calibration_memory`.

        Shared inputs, which are not known yet, can reduce the number.
        """
        if self.calibration is None:
            return 0
        if self.calibration.gradients:
            return 2 * (POWERS + 1) if self.sketches_gradients else 1
        if self.calibration_memory is None:
            return 1
        sets = len(self.calibration.sets) or 1
        waiting, passes = [sets * self.input_bytes(target) for target in self.targets], 0
        while waiting:
            used, later = 0, []
            for size in waiting:
                if used + size > self.calibration_memory:
                    later.append(size)
                else:
                    used += size
            waiting, passes = later, passes + 1
        return passes

    def directions(self, target: Target) -> int | None:
        """How many leading directions or triplets of a target the method reads; None means all."""
        return self.options.directions(target.rank, target.shape)

    @property
    def workspace_bytes(self) -> int:
        """The initializer's memory on a CPU, for the weights it decomposes at a time."""
        weights, moments = self.initializer.workspace(self.options)
        works = []
        for target in self.targets:
            rows, columns = target.shape
            numbers, squares = rows * columns, target.groups * columns**2
            needed = weights * numbers + moments * squares
            count, alike = target.experts or 1, 1
            if target.experts is not None and self.initializer.is_batched:
                alike = min(count, stack_size(max(numbers, columns**2 if moments else 0)))
            works += [(alike * numbers, alike * needed)] * math.ceil(count / alike)
        return math.ceil(4 * largest_together(works))

    def only(self, names: Collection[str]) -> Plan:
        """The plan restricted to some of the targets."""
        targets = tuple(target for target in self.targets if target.name in names)
        return dataclasses.replace(self, targets=targets)

    def with_ranks(self, ranks: Mapping[str, int], config: LoraConfig) -> Plan:
        """The plan after rank allocation. Rank 0 removes a target; scalings do not change."""
        targets, left_out = [], list(self.left_out)
        for target in self.targets:
            rank = ranks[target.name]
            if rank == 0:
                reason = f"{self.initializer.name} gave it no rank"
                left_out.append(LeftOut(target.name, target.module_type, reason))
                continue
            alpha = target.alpha
            if self.options.keeps_scaling():
                ratio = rank / target.rank
                alpha *= ratio**0.5 if config.use_rslora else ratio
            if target.groups == 1:  # else the rank is as planned
                check_target_rank(target.name, rank, target.shape, self.initializer, self.options)
            targets.append(
                dataclasses.replace(
                    target,
                    rank=rank,
                    alpha=alpha,
                    scaling=config.scaling(rank, alpha),
                    planned_rank=target.rank,
                )
            )
        by_attention: dict[str, int] = {}
        for target in targets:
            if by_attention.setdefault(target.selected, target.rank) != target.rank:
                raise ValueError(
                    f"{self.initializer.name} gives the projections of the attention "
                    f"{target.selected!r} different ranks, which is not supported: PEFT's files "
                    "have one rank for both. Leave it out (exclude_modules), or choose equal ranks "
                    "in the method's options"
                )
        kept = {f"{target.name}.bias" for target in targets}
        biases = self.trained_biases
        if self.bias == "lora_only":
            biases = tuple(name for name in biases if name in kept)
        return dataclasses.replace(
            self, targets=tuple(targets), trained_biases=biases, left_out=tuple(left_out)
        )

    @property
    def names_weights(self) -> bool:
        """Whether a file names the weights of the `mapped` targets as parameters, for PEFT.

        PEFT's adapter of a parameter has no dropout, magnitude or bias.
        """
        return not (self.dropout or self.use_dora or self.lora_bias)

    def explicit(self, config: LoraConfig) -> LoraConfig:
        """Return `config` with explicit targets, ranks and alphas, in a form that PEFT reads.

        The user's rules are not copied. PEFT does not find a layer list at a model's root, and it
        sorts the keys of a pattern, although the first match wins.
        """
        routers = [t.name for t in self.targets if FORMATS[t.module_type].operation == "selection"]
        weights = {*(self.mapped if self.names_weights else ()), *routers}
        modules = [t.selected for t in self.targets if t.experts is None and t.name not in weights]
        fused = [t.name for t in self.targets if t.experts is not None]
        known = [f"{name}.{WEIGHT}" for name in self.candidates]
        named = shortest_parameters(fused, self.fused)
        named += shortest_parameters([f"{name}.{WEIGHT}" for name in routers], known)
        named += [f"{name}.{WEIGHT}" for name in self.mapped if name in weights - set(routers)]
        # PEFT matches its patterns with the names of parameters, where a file names parameters.
        keys = {
            t.name: f"^{re.escape(t.selected)}" + rf"(\.{WEIGHT})?" * (t.name in weights)
            for t in self.targets
        }
        return dataclasses.replace(
            config,
            target_modules=portable_targets(dict.fromkeys(modules), self.candidates),
            target_parameters=named or None,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            rank_pattern={keys[t.name]: t.rank for t in self.targets if t.rank != config.r},
            alpha_pattern={
                keys[t.name]: t.alpha for t in self.targets if t.alpha != config.lora_alpha
            },
        )

    def refuse_unmatched(self, *, allowed: bool = False) -> None:
        """Raise if patterns match nothing; for names in a list, warn.

        Args:
            allowed: warn for patterns too.

        Raises:
            ValueError: a key of rank_pattern or alpha_pattern matches nothing.
        """
        for setting, entry in self.unmatched:
            message = (
                f"{setting}: {entry!r} matches none of the {len(self.targets)} targets, e.g. "
                f"{self.targets[0].name!r}; correct it or leave it out"
            )
            if setting in ("rank_pattern", "alpha_pattern") and not allowed:
                raise ValueError(message + ", or pass allow_unmatched=True")
            warnings.warn(message, stacklevel=3)

    def warn_of_left_out(self) -> None:
        """Emit one warning that lists all that the plan leaves out."""
        if self.left_out:
            lines = "\n- ".join(described(self.left_out))
            warnings.warn(f"get_peft_model leaves out:\n- {lines}", stacklevel=3)

    def __str__(self) -> str:
        spec = self.initializer
        needs = "calibration data" if self.calibration is not None else "no calibration data"
        if self.calibration is not None and self.calibration.gradients:
            needs += " with labels"
        if self.calibration is not None and self.calibration.sets:
            needs += f" in the sets {', '.join(self.calibration.sets)}"
        lines = [
            f"{spec.name} {self.options}",
            f"base: {spec.base}; output {'preserved' if spec.preserves_output else 'changed'}; "
            f"needs {needs}",
            f"{len(self.targets)} targets, {self.parameters:,} trainable parameters in factors; "
            f"memory: factors {_mib(self.factor_bytes)}, statistics at most "
            f"{_mib(self.statistics_bytes)}, workspace {_mib(self.workspace_bytes)}",
        ]
        if self.sketches_gradients:
            lines.append(
                f"{self.passes} passes over the calibration data: the gradients take "
                f"{_mib(self.gradient_bytes)} and are sketched by their leading triplets"
            )
        elif self.passes > 1 and self.calibration_memory is not None:
            lines.append(
                f"up to {self.passes} passes over the calibration data, with "
                f"{_mib(self.calibration_memory)} of statistics at a time"
            )
        variants = [name for name in ("use_dora", "lora_bias") if getattr(self, name)]
        if variants:
            lines.append(f"with {', '.join(variants)}")
        if self.trained_biases:
            lines.append(f"biases trained: {len(self.trained_biases)} ({self.bias})")
        if self.initializer.allocates and any(t.experts is not None for t in self.targets):
            lines.append("fused experts keep one rank for all, as planned")
        if self.initializer.allocates and any(t.groups > 1 for t in self.targets):
            lines.append("the groups of a convolution keep one rank for all, as planned")
        shared = [t.name for t in self.targets if t.shared_with]
        if shared and spec.base != "keep":
            how = "get a separate weight" if spec.base == "replace" else "stay as they are"
            lines.append(f"share their weight with another module, and {how}: {', '.join(shared)}")
        if self.modules_to_save:
            lines.append(f"trained whole: {', '.join(self.modules_to_save)}")
        lines += [f"left out: {line}" for line in described(self.left_out)]
        lines += [f"matches nothing: {setting} {entry!r}" for setting, entry in self.unmatched]
        rows = [
            [
                t.name,
                t.module_type,
                f"{t.shape[0]}×{t.shape[1]}" + (f" ({t.experts} experts)" if t.experts else ""),
                t.dtype,
                t.rank,
                f"{t.alpha:g}",
                f"{t.scaling:g}",
            ]
            for t in self.targets
        ]
        header = ["layer", "type", "out×in", "dtype", "rank", "alpha", "scaling"]
        return "\n".join(lines) + "\n" + render(header, rows)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
