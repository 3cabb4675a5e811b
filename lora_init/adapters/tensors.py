"""Check each tensor of an adapter file against a base model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.adapters.format import (
    FIRST_FACTOR,
    PREFIX,
    bias_key,
    file_shape,
    in_layer,
    own_channels,
    part_key,
    peft_transposes,
)
from lora_init.adapters.keys import as_in, plain_names
from lora_init.config.lora_config import LoraConfig
from lora_init.factors import Factors, Replacement
from lora_init.plan.check import FLOAT_DTYPES
from lora_init.plan.make import make_plan
from lora_init.plan.match import PatternValues, exactly
from lora_init.plan.parameters import fused_parameters
from lora_init.plan.plan import Plan, Target
from lora_init.weights.offload import factor_device

TRANSPOSES = {"lora_A": "lora_B", "lora_B": "lora_A"}
"""The part of a file whose transpose is a layer's part, where PEFT adapts transposed matrices."""


class Contents:
    """The tensors of an adapter file. Each one is taken once; remaining ones raise an error.

    Attributes:
        tensors: the tensors that were not taken yet, with the module names of the base.
        names: maps names in the model to names in the file.
        base: the base model, which does not change.
        dtype: the dtype of the factors in the model.
    """

    def __init__(self, tensors: dict[str, Tensor], base: nn.Module, dtype: torch.dtype) -> None:
        self.tensors, self.names = as_in(base, tensors)
        self.base = base
        self.dtype = dtype

    @property
    def layers(self) -> list[str]:
        """The names of the adapted modules, in the order of the file.

        Raises:
            ValueError: the file has no adapted modules.
        """
        names = [
            key[len(PREFIX) : -len(suffix)]
            for key in self.tensors
            for suffix in FIRST_FACTOR
            if key.endswith(suffix)
        ]
        if not names:
            raise ValueError(
                "the adapter file contains no lora_A: it is damaged or not a LoRA adapter"
            )
        return names

    def plan(
        self,
        config: LoraConfig,
        quantized_base: str = "in_forward",
        modules_to_save: Sequence[str] | None = None,
    ) -> tuple[LoraConfig, Plan]:
        """Create the plan for the layers in the file, and the configuration with the base's names.

        Args:
            config: the settings of the adapter.
            quantized_base: see `get_peft_model`.
            modules_to_save: the full names of fully trained modules; None applies the rule of the
                configuration.

        Raises:
            ValueError: the file and the base model or the configuration do not match.
        """
        names = self.layers
        modules = dict(self.base.named_modules())
        for name in modules_to_save or ():
            if name not in modules:
                raise ValueError(
                    f"the adapter contains a trained module {name!r}, which "
                    f"{type(self.base).__name__} does not have. Load the base model of the "
                    "training."
                )
        config = self._with_base_names(config)
        fused = fused_parameters(self.base)
        plain, experts = ([n for n in names if (n in fused) == kind] for kind in (False, True))
        by_name = dataclasses.replace(
            config,
            target_modules=exactly(plain) if plain else [],
            target_parameters=exactly(experts) if experts else None,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
        plan = make_plan(
            self.base,
            by_name,
            self.dtype,
            quantized_base=quantized_base,
            any_rank=True,
            modules_to_save=modules_to_save,
        )
        missing = set(names) - {target.name for target in plan.targets}
        if missing:
            raise ValueError(
                f"modules_to_save={config.modules_to_save!r} is not supported with the adapted "
                f"layer {sorted(missing)[0]!r} inside it. Restore the files of the adapter."
            )
        return config, plan

    def _with_base_names(self, config: LoraConfig) -> LoraConfig:
        """Rewrite the patterns of `config` if the file has other names than the base."""
        if all(name == self.names(name) for name in self.layers):
            return config
        patterns: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
        for setting, explicit in patterns.items():
            values = PatternValues(setting, getattr(config, setting), None)
            for name in self.layers:
                if (value := values(self.names(name))) is not None:
                    explicit[f"^{re.escape(name)}"] = value
        return dataclasses.replace(config, **patterns)

    def take(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Remove and return a tensor.

        Raises:
            ValueError: the tensor is missing or has another shape.
        """
        if key not in self.tensors:
            raise ValueError(f"the adapter file lacks {key!r}: it is damaged or incomplete")
        found = tuple(self.tensors[key].shape)
        if found != shape:
            raise ValueError(
                f"{key!r} has shape {found}: must be {shape} for this base model and rank. Load "
                "the base model of the training."
            )
        return self.tensors.pop(key)

    def take_float(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Remove and return a trained tensor.

        Raises:
            ValueError: see `take`; or the dtype is not supported.
        """
        if key in self.tensors and self.tensors[key].dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{key!r} has dtype {self.tensors[key].dtype}, which is not supported: must be one "
                f"of {', '.join(map(str, FLOAT_DTYPES))}. Save the adapter in one of these dtypes."
            )
        return self.take(key, shape)

    def part(self, target: Target, part: str, rank: int) -> Tensor:
        """Take one part of a layer's adapter, in the shape that layers use."""
        module = self.base.get_submodule(target.module)
        if part in TRANSPOSES and peft_transposes(target, module):
            mirrored = dataclasses.replace(target, shape=target.shape[::-1])
            other = TRANSPOSES[part]
            shape = file_shape(mirrored, module, other, rank)
            return in_layer(target, other, self.take_float(part_key(target, other), shape)).mT
        value = self.take_float(part_key(target, part), file_shape(target, module, part, rank))
        return in_layer(target, part, value)

    def parts(self, plan: Plan, doubled: int = 1) -> dict[str, dict[str, Tensor]]:
        """Take the trained parts of all layers, with `doubled` times the rank of the plan."""
        names = ["lora_A", "lora_B"]
        names += ["lora_bias"] * plan.lora_bias + ["lora_magnitude_vector"] * plan.use_dora
        return {
            target.name: {part: self.part(target, part, doubled * target.rank) for part in names}
            for target in plan.targets
        }

    def factors(
        self,
        target: Target,
        lora_A: Tensor,
        lora_B: Tensor,
        replacement: Replacement | None = None,
        core: Tensor | None = None,
    ) -> Factors:
        """Move factors to the device of the module and to the dtype of the adapter.

        A of a grouped convolution gets the width of a layer's initial factors.
        """
        device = factor_device(self.base.get_submodule(target.module), target.matrix)
        if replacement is not None:
            replacement = dataclasses.replace(
                replacement,
                lora_A=replacement.lora_A.to(device),
                lora_B=replacement.lora_B.to(device),
            )
        return Factors(
            own_channels(target, lora_A).to(device, self.dtype),
            lora_B.to(device, self.dtype),
            replacement,
            core=None if core is None else core.to(device, self.dtype),
        )

    def trained_modules(self, plan: Plan) -> dict[str, dict[str, Tensor]]:
        """Take the state dicts of all fully trained modules."""
        return {
            name: {
                key: self._like(f"{PREFIX}{name}.{key}", value)
                for key, value in self.base.get_submodule(name).state_dict().items()
            }
            for name in plan.modules_to_save
        }

    def _like(self, key: str, value: Tensor) -> Tensor:
        if value.dtype in FLOAT_DTYPES:
            return self.take_float(key, tuple(value.shape))
        taken = self.take(key, tuple(value.shape))
        if taken.dtype != value.dtype:
            raise ValueError(
                f"{key!r} has dtype {taken.dtype}: must be {value.dtype} for this base model. Load "
                "the base model of the training."
            )
        return taken

    def biases(self, plan: Plan) -> dict[str, Tensor]:
        """Take the trained biases, by the names of their parameters."""
        layers = {target.name: target for target in plan.targets}
        return {
            name: self.take_float(
                bias_key(name, layers), tuple(self.base.get_parameter(name).shape)
            )
            for name in plan.trained_biases
        }

    def in_base(self, names: Iterable[str]) -> list[str]:
        """Map module names in a header, which have no wrapper parts, to the names in the base."""
        found = {short: name for name, short in plain_names(self.base).items()}
        return [found.get(name, name) for name in names]

    def drop(self, modules: Iterable[str]) -> None:
        """Drop the tensors of modules that were saved for other loaders only."""
        beginnings = tuple(f"{PREFIX}{name}." for name in modules)
        for key in [key for key in self.tensors if key.startswith(beginnings)]:
            del self.tensors[key]

    def refuse_surplus(self, known: Mapping[str, Tensor] | None = None) -> None:
        """Raise if tensors remain that were not taken.

        Args:
            known: expected values of tensors that may remain.

        Raises:
            ValueError: a tensor is unknown, or differs from its expected value.
        """
        known = known or {}
        for key, value in self.tensors.items():
            if key not in known:
                raise ValueError(
                    f"the adapter file contains {key!r}, which does not belong to its "
                    "configuration and this base model. Load the base model of the training."
                )
            if not _same(value, known[key]):
                raise ValueError(
                    f"{key!r} in the adapter file differs from that of this base model. Load or "
                    "resize the base model of the training."
                )


def _same(value: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal up to two roundings to a 16-bit dtype."""
    if value.shape != expected.shape:
        return False
    if expected.is_meta:
        return True  # it cannot be compared, and the tensor of the base is used anyway
    expected = expected.detach().cpu()
    if not expected.is_floating_point():
        return torch.equal(value, expected)
    slack = 1e-6 * max(1.0, float(expected.abs().max())) if expected.numel() else 0.0
    return torch.allclose(value.float(), expected.float(), rtol=2.0**-7, atol=slack)
