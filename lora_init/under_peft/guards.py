"""PEFT's own methods while the base is changed: each would silently do something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from lora_init.injection.changes import Change, SetAttribute
from lora_init.under_peft.applying import take_off
from lora_init.under_peft.saving import save_pretrained
from lora_init.under_peft.start import base_owner, records


@dataclass(frozen=True)
class Guard:
    """One of PEFT's methods, replaced on one model while its base is changed.

    An object rather than a bound method or a closure, so that a copy of the model is guarded by
    itself and the model can be pickled.
    """

    function: Callable[..., Any]
    model: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.model, *args, **kwargs)


def guard(peft_model: nn.Module) -> list[Change]:
    """Let PEFT's own methods know that the base is not the original one; returns the inverses."""
    tuner = peft_model.base_model
    return [
        SetAttribute(owner, name, Guard(function, peft_model))()
        for owner, name, function in (
            (peft_model, "save_pretrained", save_pretrained),
            (peft_model, "load_adapter", load_adapter),
            (tuner, "delete_adapter", delete_adapter),
            (tuner, "unload", unload),
        )
    ]


def load_adapter(
    peft_model: nn.Module,
    model_id: str | PathLike,
    adapter_name: str,
    is_trainable: bool = False,
    **settings: Any,
) -> Any:
    """PEFT's `load_adapter` on a changed base: files for the original base are taken apart.

    Raises:
        ValueError: a file that cannot be right on this base; nothing is changed then.
    """
    # Loading a start installs these guards, so it cannot be imported by them.
    from lora_init.under_peft.loading import fill, load_peft_checkpoint, read_header, same_start

    folder = Path(model_id)
    owner = base_owner(peft_model)
    method = records(peft_model)[owner].plan.initializer.name
    if read_header(folder) is None or adapter_name not in peft_model.peft_config:
        raise ValueError(
            f"load_adapter({str(model_id)!r}, {adapter_name!r}): {method} has changed the base of "
            f"this model, and the adapter is for the original one; call "
            f"restore_peft_model(peft_model, {owner!r}) first"
        )
    if not same_start(peft_model, folder):
        if adapter_name != owner:
            raise ValueError(
                f"load_adapter({str(model_id)!r}, {adapter_name!r}): the adapter belongs to "
                f"another start of {method} than adapter {owner!r} of this model"
            )
        load_peft_checkpoint(peft_model, folder, adapter_name)
        result = _IncompatibleKeys([], [])
    else:
        result = fill(peft_model, folder, adapter_name, is_trainable=is_trainable, **settings)
    if not is_trainable:
        peft_model.eval()
    return result


def delete_adapter(peft_model: nn.Module, adapter_name: str) -> None:
    """PEFT's `delete_adapter`, with the original base put back where this adapter has changed it.

    Raises:
        ValueError: other adapters live on the changed base.
    """
    owner = base_owner(peft_model)
    tuner = peft_model.base_model
    if adapter_name == owner:
        others = [name for name in peft_model.peft_config if name != owner]
        if others:
            raise ValueError(
                f"delete_adapter({adapter_name!r}): adapter {others[0]!r} was trained on the base "
                f"that {adapter_name!r} has changed; delete it first"
            )
        take_off(peft_model, owner)
    type(tuner).delete_adapter(tuner, adapter_name)


def unload(peft_model: nn.Module) -> nn.Module:
    """PEFT's `unload`, with the original base put back.

    Raises:
        RuntimeError: a base was replaced and its original not kept.
    """
    tuner = peft_model.base_model
    take_off(peft_model, base_owner(peft_model))
    return type(tuner).unload(tuner)
