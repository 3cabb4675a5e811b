"""A plugin for axolotl: a section of its YAML says how the adapter starts.

    plugins: [lora_init.integrations.axolotl.LoraInitPlugin]
    lora_init: {method: eva, batches: 32}

The plugin adds `LoraInitCallback` to the trainer. axolotl's `post_lora_load` would be too early: it
has no data, and no PEFT model under DPO. It is also called for inference and merges.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator

from lora_init.integrations.transformers import LoraInitCallback
from lora_init.registry import resolve

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
"""Settings of axolotl that replace the forward pass of the adapted layers."""


class LoraInitArgs(BaseModel):
    """The section that the plugin adds to axolotl's configuration.

    Attributes:
        lora_init: the arguments of `LoraInitCallback`.
    """

    lora_init: dict[str, Any]

    @model_validator(mode="after")
    def _check_lora_init(self) -> LoraInitArgs:
        """Refuse wrong settings before the model is loaded.

        Raises:
            ValueError: a setting is not supported, or the start needs layers that the kernels skip.
        """
        if "method" not in self.lora_init:
            raise ValueError("lora_init: method must be the name of a method, such as pissa")
        try:
            callback = LoraInitCallback(**self.lora_init)
        except TypeError as error:
            raise ValueError(f"lora_init: {error}") from error
        spec, _ = resolve(callback.method)
        fused = [name for name in KERNELS if getattr(self, name, None)]
        if fused and (spec.needs_data or spec.base == "subtract"):
            raise ValueError(
                f"{fused[0]}=true is not supported with lora_init.method={spec.name}: it computes "
                "the adapted layers without calling them, so no calibration and no subtraction "
                f"reaches them. Set {', '.join(KERNELS)} to false"
            )
        return self


class LoraInitPlugin(BasePlugin):
    """Initialize the adapter of an axolotl training by the configuration's `lora_init`."""

    def get_input_args(self) -> str:
        """The class whose fields axolotl adds to its configuration."""
        return f"{LoraInitArgs.__module__}.{LoraInitArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[LoraInitCallback]:
        """The trainer's callback; axolotl calls this for each training."""
        return [LoraInitCallback(**cfg.lora_init)]
