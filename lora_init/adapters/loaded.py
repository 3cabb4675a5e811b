"""What reading an adapter's files gives."""

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
    """A file that has been read and checked against a base model.

    Attributes:
        config, plan: the settings, and the targets found in the base.
        weights: what replaced bases are rebuilt from.
        factors: what `inject` needs: initial factors where they are known, else the trained ones.
        parts: the trained parts of every layer (lora_A, lora_B, …) by target and part name.
        trained_modules: tensors of the modules trained whole, by module and parameter name.
        biases: trained biases by parameter name.
        rows: of the base's embeddings, by parameter name, where the file holds other ones.
        checksums: of the replaced bases as they were when the adapter was saved.
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
