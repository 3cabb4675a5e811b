"""PEFT's configuration of an adapter on the original base, at rank 2r."""

from __future__ import annotations

import copy
from typing import Any

from lora_init.adapters.save import exported_config
from lora_init.config.lora_config import LoraConfig
from lora_init.plan.plan import Plan


def exported_peft_config(peft_config: Any, config: LoraConfig, plan: Plan) -> Any:
    """A copy of PEFT's configuration that fits [A; A0] and [B, -B0].

    Args:
        peft_config: PEFT's, of the adapter on the changed base.
        config, plan: ours, of its initialization.
    """
    converted = copy.copy(peft_config)
    vars(converted).pop("to_dict", None)  # set by `lora_init.peft_models.injected`
    doubled = exported_config(config, plan)
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        setattr(converted, name, getattr(doubled, name))
    converted.init_lora_weights = True
    converted.eva_config, converted.corda_config, converted.loftq_config = None, None, {}
    return converted
