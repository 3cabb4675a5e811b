"""Methods of an injected base model that would write or change its wrapped layers.

A base that has an adapter is not the model that its own `save_pretrained` knows: the file would
hold keys such as `q_proj.base_layer.weight`, and maybe an edited weight. While it is injected,
these methods are covered by attributes of the instance.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from lora_init.layers import LoraLayer, TrainedModule

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
    """Stands for a method of an injected model. `save_pretrained` writes the adapter instead.

    So do models of transformers into which PEFT has injected an adapter.

    Attributes:
        name: of the method.
        owner: the LoraModel whose base the method belongs to; None in a part of the base, and in a
            copy of the base alone.
    """

    def __init__(self, name: str, owner: nn.Module | None = None) -> None:
        self.name = name
        self.owner = (lambda: None) if owner is None else weakref.ref(owner)

    def __reduce__(self) -> tuple:
        return CoveredMethod, (self.name,)  # a copied LoraModel covers the methods of its own base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.owner()
        if self.name != "save_pretrained" or model is None:
            raise NotImplementedError(
                f"{self.name} of a model with an adapter is not supported: {REFUSALS[self.name]}, "
                "or merge_and_unload() for the whole model"
            )
        folder = args[0] if args else kwargs["save_directory"]
        # No state dict: the one that a trainer passes is of the base.
        return model.save_pretrained(folder, is_main_process=kwargs.get("is_main_process", True))


def cover_methods(model: nn.Module, base: nn.Module) -> None:
    """Cover the methods of `base`, and of the parts of it that have adapted layers.

    Args:
        model: the LoraModel around `base`.
    """
    for module in base.modules():
        if isinstance(module, LoraLayer | TrainedModule):
            continue
        names = [name for name in REFUSALS if callable(getattr(type(module), name, None))]
        if names and any(isinstance(part, LoraLayer | TrainedModule) for part in module.modules()):
            for name in names:
                setattr(module, name, CoveredMethod(name, model if module is base else None))


def uncover_methods(base: nn.Module) -> None:
    """Give the methods back."""
    for module in base.modules():
        for name in REFUSALS:
            if isinstance(vars(module).get(name), CoveredMethod):
                delattr(module, name)
