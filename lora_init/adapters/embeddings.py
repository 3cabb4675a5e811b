"""Save and load the input and output embeddings of a resized vocabulary.

The base model's checkpoint has no rows for new tokens. An adapter file can therefore contain the
embeddings. A file without them records their shapes and samples, and cannot be loaded into a model
with another vocabulary size.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.adapters.format import PREFIX
from lora_init.injection import Transaction
from lora_init.layers import LoraLayer
from lora_init.plan.match import name_matches
from lora_init.weights.fingerprint import fingerprint, has_fingerprint
from lora_init.weights.kinds import is_quantized
from lora_init.weights.sharded import assign, whole, whole_shape

PEFT_NAMES = ("embed_tokens", "lm_head")
"""Names of embeddings that PEFT saves if they are adapted."""


def embeddings(model: nn.Module) -> dict[str, Any]:
    """The original input and output embedding modules of a transformers model, by name."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(model, getter, None)
        try:
            module = get() if callable(get) else None
        except (NotImplementedError, AttributeError):  # a model without one
            module = None
        if isinstance(module, nn.Module) and module not in found:
            found.append(module)
    names = {module: name for name, module in model.named_modules()}
    plain = {names[m]: m.base_layer if isinstance(m, LoraLayer) else m for m in found if m in names}
    return {
        name: module
        for name, module in plain.items()
        if isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.is_floating_point()
        and not is_quantized(module)
    }


def description(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe the vocabulary for a file: the shape and a fingerprint of each embedding."""
    recorded: dict[str, dict[str, Any]] = {}
    for name, module in embeddings(model).items():
        weight = module.weight
        recorded[name] = {"shape": list(whole_shape(weight))}
        if _comparable(weight):
            recorded[name]["fingerprint"] = fingerprint(weight.detach())
    return recorded


def check_vocabulary(
    model: nn.Module, recorded: Mapping[str, Mapping[str, Any]], known: set[str]
) -> None:
    """Compare the vocabulary of the base with the one that the adapter was trained with.

    Different rows of the same shape only cause a warning.

    Args:
        model: the base model.
        recorded: the result of `description` when the adapter was saved.
        known: names of embeddings that the file contains or that are checked elsewhere.

    Raises:
        ValueError: the shape of an embedding differs.
    """
    for name, module in embeddings(model).items():
        expected = recorded.get(name)
        if expected is None or name in known:
            continue
        shape, wanted = list(whole_shape(module.weight)), expected["shape"]
        if shape != wanted:
            raise ValueError(
                f"the adapter was trained with a vocabulary of {wanted[0]} entries ({name!r}), "
                f"but this base model has {shape[0]}. Call base.resize_token_embeddings("
                f"{wanted[0]}) first. To keep new rows, save the adapter with "
                "save_embedding_layers=True."
            )
        samples = expected.get("fingerprint")
        if samples is None or not _comparable(module.weight):
            continue
        if not has_fingerprint(module.weight.detach(), samples):
            warnings.warn(
                f"the rows of {name!r} are not those the adapter was trained with, so outputs "
                "differ. If the vocabulary was resized, save the adapter with "
                "save_embedding_layers=True.",
                stacklevel=6,
            )


def rows_are_needed(
    model: nn.Module,
    setting: str | bool,
    targets: list[str],
    model_name: str | None,
    were_loaded: bool,
) -> bool:
    """Whether to save the embeddings. "auto" follows PEFT's rule, but without network access.

    Args:
        model: the base model.
        setting: the value of save_embedding_layers.
        targets: the names of the adapted modules.
        model_name: the folder or the hub name of the base model.
        were_loaded: whether the embeddings were loaded from an adapter file.

    Raises:
        ValueError: the value of the setting is not supported.
    """
    if setting is True or setting is False:
        return setting
    if setting != "auto":
        raise ValueError(
            f"save_embedding_layers={setting!r} is not supported: must be one of 'auto', True, "
            "False. Choose one of them."
        )
    if were_loaded or any(name_matches(t, name) for t in targets for name in PEFT_NAMES):
        return True
    config = getattr(model, "config", None)
    size = _vocabulary(config)
    before = _saved_vocabulary(config, model_name) if size and model_name else None
    return before is not None and before != size


def rows(
    model: nn.Module, left_out: set[str], originals: Mapping[str, Tensor], required: bool
) -> dict[str, Tensor]:
    """The tensors of the embeddings, by their keys in the file.

    Args:
        model: the base model.
        left_out: names of modules that the file already contains, or whose original is lost.
        originals: original weights of adapted modules, as stored before injection, by name.
        required: whether to raise if a weight is not loaded; otherwise it is skipped.

    Raises:
        ValueError: a required weight is not loaded.
    """
    found = embeddings(model)
    if not found:
        warnings.warn(
            "save_embedding_layers=True has no effect, because the model has no "
            "get_input_embeddings as in transformers. No embeddings are saved.",
            stacklevel=4,
        )
    tensors: dict[str, Tensor] = {}
    owners = {id(module.weight): name for name, module in reversed(found.items())}
    for name, module in found.items():
        if name in left_out or (module.weight.is_meta and not required):
            continue
        if module.weight.is_meta:
            raise ValueError(
                f"save_embedding_layers: the weight of {name!r} is on the meta device. Load the "
                "model first, or pass save_embedding_layers=False."
            )
        if name != owners[id(module.weight)]:
            continue  # tied to another one
        if name in originals:
            tensors[f"{PREFIX}{name}.base_layer.weight"] = originals[name]
        else:
            for key, value in module.state_dict(keep_vars=True).items():  # parts, to be gathered
                tensors[f"{PREFIX}{name}.{key}"] = value
    return tensors


def take_rows(base: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the embeddings from a file's tensors, and return those that differ from the base.

    Args:
        base: the base model.
        tensors: the tensors of the file; the embeddings are removed.

    Returns:
        The tensors by the names of the base's parameters.

    Raises:
        ValueError: an embedding of the base has another shape.
    """
    found: dict[str, Tensor] = {}
    for name, module in embeddings(base).items():
        for part, parameter in module.named_parameters():
            for key in (f"{PREFIX}{name}.{part}", f"{PREFIX}{name}.base_layer.{part}"):
                if key not in tensors or not parameter.is_floating_point():
                    continue
                value = tensors.pop(key)
                if value.shape != whole_shape(parameter):
                    raise ValueError(
                        f"{key!r} in the adapter file has shape {tuple(value.shape)}, but this "
                        f"base model has {tuple(whole_shape(parameter))}. Call base."
                        f"resize_token_embeddings({len(value)}) first, or load the base model of "
                        "the training."
                    )
                if not value.is_floating_point():
                    raise ValueError(f"{key!r} has dtype {value.dtype}. The file is damaged.")
                if not parameter.is_meta and not same_rows(value, whole(parameter)):
                    found[f"{name}.{part}"] = value
    return found


def put_rows(base: nn.Module, rows: Mapping[str, Tensor], transaction: Transaction) -> None:
    """Copy the rows of a file into the embeddings of the base, permanently."""
    if rows:
        warnings.warn(
            f"the rows of {', '.join(map(repr, rows))} in the base model are replaced by those of "
            "the adapter file, as in PEFT. The vocabulary was resized, or the rows were trained.",
            stacklevel=5,
        )
    for name, value in rows.items():
        path, _, own_name = name.rpartition(".")
        transaction.values(base.get_submodule(path), own_name)
        assign(base.get_parameter(name), value)


def same_rows(value: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal up to two roundings to a 16-bit dtype."""
    expected = expected.detach().cpu()
    slack = 1e-6 * max(1.0, float(expected.abs().max())) if expected.numel() else 0.0
    return torch.allclose(value.float(), expected.float(), rtol=2.0**-7, atol=slack)


def _comparable(weight: Tensor) -> bool:
    return (
        not weight.is_meta
        and weight.ndim == 2
        and weight.numel() > 0
        and weight.is_floating_point()
        and type(weight.data).__name__ in ("Tensor", "Parameter")
    )


def _vocabulary(config: Any) -> int | None:
    size = getattr(config, "vocab_size", None)
    if size is None:
        size = getattr(getattr(config, "text_config", None), "vocab_size", None)
    return size


def _saved_vocabulary(config: Any, model_name: str) -> int | None:
    """The vocabulary size of the saved model, from its folder or the local hub cache."""
    load = getattr(type(config), "from_pretrained", None)
    if load is None:
        return None
    try:
        return _vocabulary(load(model_name, local_files_only=True))
    except (OSError, ValueError, TypeError):  # the model is not on this machine
        return None
