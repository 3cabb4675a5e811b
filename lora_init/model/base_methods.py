"""Replace methods of the base model that would write or change its adapted layers.

A base model with an adapter has keys such as `q_proj.base_layer.weight`, and its weights may be
modified. Its own `save_pretrained` would write these. While the adapter is injected, attributes of
the instance hide such methods.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_init.layers import LoraLayer, TrainedModule

if TYPE_CHECKING:
    from lora_init.model.lora_model import LoraModel

_ONE = "it has an adapter already, and one adapter per model is supported; call unload() first"
_SAVE = "it would write the wrapped layers; call save_pretrained of the LoraModel"
REFUSALS = {
    "save_pretrained": _SAVE,
    "save": _SAVE,
    "push_to_hub": "it would upload the wrapped layers; call push_to_hub of the LoraModel",
    "save_to_hub": "it would upload the wrapped layers; call push_to_hub of the LoraModel",
    "add_adapter": _ONE,
    "load_adapter": _ONE,
    "dequantize": "it would replace the wrapped layers; call unload() first",
}


class CoveredMethod:
    """Replaces a method of a base model with an adapter.

    `save_pretrained` writes the adapter, as transformers does for models with a PEFT adapter. The
    other methods raise a NotImplementedError.

    Attributes:
        name: the name of the method.
        owner: returns the LoraModel of the base, or None for a submodule or a copy of the base.
    """

    def __init__(self, name: str, owner: LoraModel | None = None) -> None:
        self.name = name
        self.owner = (lambda: None) if owner is None else weakref.ref(owner)

    def __reduce__(self) -> tuple:
        return CoveredMethod, (self.name,)  # a copied LoraModel covers the methods of its base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.owner()
        if self.name != "save_pretrained" or model is None:
            raise NotImplementedError(
                f"{self.name} of a model with an adapter is not supported: {REFUSALS[self.name]}, "
                "or merge_and_unload() for the whole model"
            )
        folder = args[0] if args else kwargs["save_directory"]
        # The state dict that a trainer passes is the base model's, so it is ignored.
        return model.save_pretrained(folder, is_main_process=kwargs.get("is_main_process", True))


def cover_methods(model: LoraModel, base: nn.Module) -> None:
    """Replace the methods in `REFUSALS` on `base` and on its submodules with adapted layers.

    Args:
        model: the LoraModel of `base`.
        base: the base model, after injection.
    """
    for module in base.modules():
        if isinstance(module, LoraLayer | TrainedModule):
            continue
        names = [name for name in REFUSALS if callable(getattr(type(module), name, None))]
        if names and any(isinstance(part, LoraLayer | TrainedModule) for part in module.modules()):
            for name in names:
                setattr(module, name, CoveredMethod(name, model if module is base else None))


def uncover_methods(base: nn.Module) -> None:
    """Restore the methods that `cover_methods` replaced."""
    for module in base.modules():
        for name in REFUSALS:
            if isinstance(vars(module).get(name), CoveredMethod):
                delattr(module, name)
