"""`LoadedAdapter`: the content of an adapter's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lora_init.config.lora_config import LoraConfig
from lora_init.factors import Factors
from lora_init.plan.plan import Plan
from lora_init.weights.source import BaseWeights


@dataclass
class LoadedAdapter:
    """The content of an adapter's files, checked against a base model.

    Attributes:
        config: the settings of the adapter.
        plan: the targets in the base model.
        weights: the weights from which replaced base weights are computed.
        factors: the factors to inject: the initial ones if they are known, else the trained ones.
        parts: the trained tensors of each layer (lora_A, lora_B, …), by target and part name.
        trained_modules: the tensors of fully trained modules, by module and parameter name.
        biases: the trained biases, by parameter name.
        rows: embeddings that differ from those of the base, by parameter name.
        checksums: checksums of the replaced base weights from when the adapter was saved.
    """

    config: LoraConfig
    plan: Plan
    weights: BaseWeights
    factors: dict[str, Factors]
    parts: dict[str, dict[str, Tensor]]
    trained_modules: dict[str, dict[str, Tensor]]
    biases: dict[str, Tensor]
    rows: dict[str, Tensor] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
