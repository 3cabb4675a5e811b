"""The tensors of an adapter file, checked one by one against a base model."""

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
    matrix,
    part_key,
)
from lora_init.adapters.keys import as_in, plain_names
from lora_init.config.lora_config import LoraConfig
from lora_init.factors import Factors, Replacement
from lora_init.plan.check import FLOAT_DTYPES
from lora_init.plan.make import make_plan
from lora_init.plan.match import PatternValues, exactly
from lora_init.plan.plan import Plan, Target
from lora_init.weights.offload import factor_device


class Contents:
    """What a file holds. Every tensor is taken once; what is left in the end is refused.

    Attributes:
        tensors: those not taken yet, under the names of the base's modules.
        names: what the adapted layers are called in the file.
        base: the model that the adapter is for; only read.
        dtype: of the factors in the model.
    """

    def __init__(self, tensors: dict[str, Tensor], base: nn.Module, dtype: torch.dtype) -> None:
        self.tensors, self.names = as_in(base, tensors)
        self.base = base
        self.dtype = dtype

    @property
    def layers(self) -> list[str]:
        """The names of the adapted modules, in the order of the file.

        Raises:
            ValueError: there are none.
        """
        names = [
            key[len(PREFIX) : -len(suffix)]
            for key in self.tensors
            for suffix in FIRST_FACTOR
            if key.endswith(suffix)
        ]
        if not names:
            raise ValueError("the adapter file holds no lora_A; it is no LoRA adapter, or damaged")
        return names

    def plan(
        self,
        config: LoraConfig,
        quantized_base: str = "in_forward",
        modules_to_save: Sequence[str] | None = None,
    ) -> tuple[LoraConfig, Plan]:
        """The plan for the layers that the file holds, and the configuration that describes it.

        Args:
            modules_to_save: full names; None leaves it to the configuration's rule.
        """
        names = self.layers
        modules = dict(self.base.named_modules())
        for name in modules_to_save or ():
            if name not in modules:
                raise ValueError(
                    f"the adapter trains a module {name!r} whole, which {type(self.base).__name__} "
                    "does not have. Load the base model it was trained on"
                )
        config = self._with_base_names(config)
        by_name = dataclasses.replace(
            config,
            target_modules=exactly(names),
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
                f"the adapter's layer {sorted(missing)[0]!r} lies inside modules_to_save="
                f"{config.modules_to_save!r}; the files contradict each other"
            )
        return config, plan

    def _with_base_names(self, config: LoraConfig) -> LoraConfig:
        """`config` with patterns that mean the base's names, where the file has other ones."""
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
        if key not in self.tensors:
            raise ValueError(f"the adapter file lacks {key!r}; it is damaged or incomplete")
        found = tuple(self.tensors[key].shape)
        if found != shape:
            raise ValueError(
                f"{key!r} has shape {found}, this base model and rank need {shape}; load the base "
                "model the adapter was trained on"
            )
        return self.tensors.pop(key)

    def take_float(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Take a tensor that is trained.

        Raises:
            ValueError: as `take`, or its dtype cannot be trained.
        """
        if key in self.tensors and self.tensors[key].dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{key!r} has dtype {self.tensors[key].dtype}, which is not supported: must be one "
                f"of {', '.join(map(str, FLOAT_DTYPES))}; the file is damaged, or save it again"
            )
        return self.take(key, shape)

    def part(self, target: Target, part: str, rank: int) -> Tensor:
        """One part of a layer's adapter, as the layers hold it."""
        module = self.base.get_submodule(target.name)
        value = self.take_float(part_key(target, part), file_shape(target, module, part, rank))
        return matrix(part, value)

    def parts(self, plan: Plan, doubled: int = 1) -> dict[str, dict[str, Tensor]]:
        """Every layer's trained parts, the factors of `doubled` times the rank."""
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
    ) -> Factors:
        """What `inject` needs, beside the module's weight and in the adapter's dtype."""
        device = factor_device(self.base.get_submodule(target.name))
        if replacement is not None:
            replacement = dataclasses.replace(
                replacement,
                lora_A=replacement.lora_A.to(device),
                lora_B=replacement.lora_B.to(device),
            )
        return Factors(lora_A.to(device, self.dtype), lora_B.to(device, self.dtype), replacement)

    def trained_modules(self, plan: Plan) -> dict[str, dict[str, Tensor]]:
        """The state of every module trained whole."""
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
                f"{key!r} has dtype {taken.dtype}, this base model has {value.dtype}; load the "
                "base model the adapter was trained on"
            )
        return taken

    def biases(self, plan: Plan) -> dict[str, Tensor]:
        """The trained biases, by the names of their parameters."""
        layers = {target.name: target for target in plan.targets}
        return {
            name: self.take_float(
                bias_key(name, layers), tuple(self.base.get_parameter(name).shape)
            )
            for name in plan.trained_biases
        }

    def in_base(self, names: Iterable[str]) -> list[str]:
        """The base's names of modules that a file's header names without wrappers."""
        found = {short: name for name, short in plain_names(self.base).items()}
        return [found.get(name, name) for name in names]

    def drop(self, modules: Iterable[str]) -> None:
        """Leave out the tensors of modules whose copies are there for another loader."""
        beginnings = tuple(f"{PREFIX}{name}." for name in modules)
        for key in [key for key in self.tensors if key.startswith(beginnings)]:
            del self.tensors[key]

    def refuse_surplus(self, known: Mapping[str, Tensor] | None = None) -> None:
        """Refuse what nothing has asked for.

        Args:
            known: tensors that may be there too, if they are equal to these.
        """
        known = known or {}
        for key, value in self.tensors.items():
            if key not in known:
                raise ValueError(
                    f"the adapter file holds {key!r}, which its configuration and this base model "
                    "have no place for; load the base model it was trained on"
                )
            if not _same(value, known[key]):
                raise ValueError(
                    f"the adapter file holds another {key!r} than this base model; resize or load "
                    "the base model it was trained on"
                )


def _same(value: Tensor, expected: Tensor) -> bool:
    """Equal up to two roundings to 16 bits, whichever of the two is in which dtype."""
    if value.shape != expected.shape:
        return False
    if expected.is_meta:
        return True  # there is nothing to compare it with, and the base's own is what counts
    expected = expected.detach().cpu()
    if not expected.is_floating_point():
        return torch.equal(value, expected)
    slack = 1e-6 * max(1.0, float(expected.abs().max())) if expected.numel() else 0.0
    return torch.allclose(value.float(), expected.float(), rtol=2.0**-7, atol=slack)
