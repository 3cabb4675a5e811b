"""The rows of the input and output embeddings, which belong to a resized vocabulary.

New rows are in no checkpoint of the base model. So an adapter's file may hold the whole embeddings,
and a file without them records what they were: loading it onto another vocabulary is refused.
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

PEFT_NAMES = ("embed_tokens", "lm_head")
"""Names of the embeddings that PEFT saves where they are adapted."""


def embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The input and output embeddings of a transformers model, by name; without wrappers."""
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
        and module.weight.is_floating_point()  # not packed
    }


def description(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a file records of the vocabulary: the shape and samples of each embedding."""
    recorded: dict[str, dict[str, Any]] = {}
    for name, module in embeddings(model).items():
        weight = module.weight
        recorded[name] = {"shape": list(weight.shape)}
        if _comparable(weight):
            recorded[name]["fingerprint"] = fingerprint(weight.detach())
    return recorded


def check_vocabulary(
    model: nn.Module, recorded: Mapping[str, Mapping[str, Any]], known: set[str]
) -> None:
    """Compare the base's vocabulary with the one that an adapter was trained with.

    Args:
        recorded: from `description`.
        known: embeddings that the file holds, or whose weight is compared elsewhere.

    Raises:
        ValueError: it has another size, and the file does not hold its rows.
    """
    for name, module in embeddings(model).items():
        expected = recorded.get(name)
        if expected is None or name in known:
            continue
        shape, wanted = list(module.weight.shape), expected["shape"]
        if shape != wanted:
            raise ValueError(
                f"the adapter was trained with a vocabulary of {wanted[0]} entries ({name!r}), "
                f"this base model has {shape[0]}; call base.resize_token_embeddings({wanted[0]}), "
                "or save the adapter with save_embedding_layers=True after that"
            )
        samples = expected.get("fingerprint")
        if samples is None or not _comparable(module.weight):
            continue
        if not has_fingerprint(module.weight.detach(), samples):
            warnings.warn(
                f"the rows of {name!r} are not those the adapter was trained with, so outputs "
                "differ; save the adapter with save_embedding_layers=True where the vocabulary "
                "was resized",
                stacklevel=6,
            )


def rows_are_needed(
    model: nn.Module,
    setting: str | bool,
    targets: list[str],
    model_name: str | None,
    were_loaded: bool,
) -> bool:
    """Whether a file is to hold the embeddings: PEFT's rule for "auto", without a network.

    Args:
        setting: save_embedding_layers.
        targets: the names of the adapted modules.
        model_name: the folder or the hub's name of the base model.
        were_loaded: whether the embeddings came from an adapter's file.

    Raises:
        ValueError: another value of the setting.
    """
    if setting is True or setting is False:
        return setting
    if setting != "auto":
        raise ValueError(
            f"save_embedding_layers={setting!r} is not supported: must be one of 'auto', True, "
            "False. Choose one of them"
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
    """The embeddings' tensors by key.

    Args:
        left_out: names of modules that the file holds anyway, or whose original is gone.
        originals: weights of adapted modules before injection, as they are stored, by name.
        required: refuse weights that are not loaded; else they are left out.

    Raises:
        ValueError: a required weight is not loaded.
    """
    found = embeddings(model)
    if not found:
        warnings.warn(
            "save_embedding_layers=True, but the model has no get_input_embeddings, as models of "
            "transformers have; no embeddings are saved",
            stacklevel=4,
        )
    tensors: dict[str, Tensor] = {}
    owners = {id(module.weight): name for name, module in reversed(found.items())}
    for name, module in found.items():
        if name in left_out or (module.weight.is_meta and not required):
            continue
        if module.weight.is_meta:
            raise ValueError(
                f"save_embedding_layers: the weight of {name!r} is on the meta device; load the "
                "model first, or pass save_embedding_layers=False"
            )
        if name != owners[id(module.weight)]:
            continue  # tied to another one
        if name in originals:
            tensors[f"{PREFIX}{name}.base_layer.weight"] = originals[name]
        else:
            for key, value in module.state_dict().items():
                tensors[f"{PREFIX}{name}.{key}"] = value
    return tensors


def take_rows(base: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the embeddings out of a file's tensors, by the base's parameter.

    Those that the base has already are left out.

    Raises:
        ValueError: the base's embedding has another shape.
    """
    found: dict[str, Tensor] = {}
    for name, module in embeddings(base).items():
        for part, parameter in module.named_parameters():
            for key in (f"{PREFIX}{name}.{part}", f"{PREFIX}{name}.base_layer.{part}"):
                if key not in tensors or not parameter.is_floating_point():
                    continue
                value = tensors.pop(key)
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"the adapter file holds another {key!r} than this base model, of shape "
                        f"{tuple(value.shape)} against {tuple(parameter.shape)}; call base."
                        f"resize_token_embeddings({len(value)}) first, or load the base model it "
                        "was trained on"
                    )
                if not value.is_floating_point():
                    raise ValueError(f"{key!r} has dtype {value.dtype}; the file is damaged")
                if not parameter.is_meta and not same_rows(value, parameter):
                    found[f"{name}.{part}"] = value
    return found


def put_rows(base: nn.Module, rows: Mapping[str, Tensor], transaction: Transaction) -> None:
    """Put a file's rows into the base's embeddings, where they stay."""
    if rows:
        warnings.warn(
            f"the adapter file holds other rows of {', '.join(map(repr, rows))} than the base "
            "model, which gets them, as in PEFT: its vocabulary was resized, or they were trained",
            stacklevel=5,
        )
    for name, value in rows.items():
        path, _, own_name = name.rpartition(".")
        transaction.values(base.get_submodule(path), own_name)
        with torch.no_grad():
            base.get_parameter(name).copy_(value)


def same_rows(value: Tensor, expected: Tensor) -> bool:
    """Equal up to two roundings to 16 bits, whichever of the two is in which dtype."""
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
    """The vocabulary that a model was saved with, from its folder or the hub's local cache."""
    load = getattr(type(config), "from_pretrained", None)
    if load is None:
        return None
    try:
        return _vocabulary(load(model_name, local_files_only=True))
    except (OSError, ValueError, TypeError):  # it is not on this machine
        return None
