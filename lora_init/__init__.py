"""Initialize low-rank adapters (LoRA). Every initialization method is in one registry.

from lora_init import LoraConfig, get_peft_model

model = get_peft_model(model, LoraConfig(r=16, init_lora_weights="pissa"))
"""

from lora_init.api import apply_factors, calibrate, get_peft_model, init_factors, reinitialize
from lora_init.calibration.batches import WithLoss
from lora_init.calibration.result import Calibration
from lora_init.config.lora_config import LoraConfig
from lora_init.factors import Factors, Replacement
from lora_init.layer import Layer
from lora_init.model.lora_model import LoraModel
from lora_init.model.report import InitReport
from lora_init.peft_models import (
    initialize_peft_model,
    load_peft_checkpoint,
    restore_peft_model,
    save_peft_model,
)
from lora_init.plan.plan import Plan
from lora_init.registry import (
    CalibrationRequest,
    Initializer,
    Options,
    batched,
    list_initializers,
    register_initializer,
)
from lora_init.weights.format import WeightFormat
from lora_init.weights.kinds import register_weight_format

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CalibrationRequest",
    "Factors",
    "InitReport",
    "Initializer",
    "Layer",
    "LoraConfig",
    "LoraModel",
    "Options",
    "Plan",
    "Replacement",
    "WeightFormat",
    "WithLoss",
    "apply_factors",
    "batched",
    "calibrate",
    "get_peft_model",
    "init_factors",
    "initialize_peft_model",
    "list_initializers",
    "load_peft_checkpoint",
    "register_initializer",
    "register_weight_format",
    "reinitialize",
    "restore_peft_model",
    "save_peft_model",
]
