"""Load adapters that PEFT saved: plain ones, and those of methods that change the base weights.

PEFT 0.21.2 writes more than the adapter, and some of its layers ignore settings of the base:

- If target_modules names "embed_tokens" or "lm_head", the file also contains the weight of the
  base, `….base_layer.weight`. A resized vocabulary adds both embeddings.
- With bias="all" and modules_to_save, the bias of a saved module occurs three times: as
  `<module>.bias`, as `<module>.modules_to_save.bias` and, untrained, as
  `<module>.original_module.bias`. Older versions wrote all tensors with "bias" in their name, such
  as T5's `relative_attention_bias.weight`.
- "pissa" and "olora" initialize an embedding like True, and keep its weight.
- A of a convolution uses the stride and padding of the base, but not its dilation and padding
  mode.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.adapters.edited import KEPT_STARTS
from lora_init.adapters.embeddings import take_rows
from lora_init.adapters.format import PREFIX, peft_computes
from lora_init.adapters.loaded import LoadedAdapter
from lora_init.adapters.saved_modules import in_file
from lora_init.adapters.tensors import Contents
from lora_init.config.file import method_of
from lora_init.config.lora_config import LoraConfig
from lora_init.factors import Factors, block_matrix, low_rank_product
from lora_init.layer import Layer
from lora_init.linalg.matrix import widened
from lora_init.plan.match import select
from lora_init.plan.plan import Plan, Target
from lora_init.plan.tables import listed
from lora_init.weights.kinds import FORMATS, known_format, module_type
from lora_init.weights.source import BaseWeights

REBUILT = ("pissa", "olora")
CHANGED = ("pissa", "olora", "corda", "lora_ga", "astra")

CONVERT = "Convert it with PEFT's path_initial_model_for_weight_conversion first."


def foreign_config(values: dict[str, Any]) -> tuple[LoraConfig, Any]:
    """The configuration and the method of a file of PEFT, from its adapter_config.json.

    Raises:
        ValueError: the method or a setting is not supported.
    """
    method = method_of(values.get("init_lora_weights"))
    method = True if method is None else method
    if method not in KEPT_STARTS and method not in REBUILT:
        raise ValueError(_unknown_start(method))
    # If the base was kept, the method does not matter after training. Its options may have values
    # that lora_init does not support.
    start = {"init_lora_weights": method if method in REBUILT else True}
    return LoraConfig.from_dict(values | start), method


def read_foreign(
    contents: Contents, weights: BaseWeights, config: LoraConfig, method: Any
) -> LoadedAdapter:
    """Check a file of PEFT against the base; `foreign_config` has its configuration."""
    base = contents.base
    if method == "olora" and any(key.endswith(".lora_embedding_A") for key in contents.tensors):
        raise ValueError(
            f"an unconverted olora adapter of PEFT with an embedding is not supported. {CONVERT}"
        )
    if method == "pissa":
        config.init_lora_weights = {"name": "pissa", "method": "exact"}
    written = config
    saved = in_file(base, contents.tensors, contents.layers, config)
    config, plan = contents.plan(config, modules_to_save=saved)
    _warn_of_missing_layers(contents, written, plan)
    weights.check_unloaded(plan.targets)
    for target in plan.targets:
        _refuse_unlike_ours(target, base.get_submodule(target.module), method)
        if target.groups > 1 and plan.use_dora:
            raise ValueError(
                f"use_dora=True of a PEFT adapter is not supported for {target.name!r}, a "
                f"convolution with groups={target.groups}: PEFT reads the norms of another weight "
                "there. Leave the layer out and train again."
            )
    if method == "loftq":
        warnings.warn(
            "a PEFT adapter with init_lora_weights='loftq' corrects the error of a base that PEFT "
            "quantized for the training. It fits that quantized base only.",
            stacklevel=4,
        )
    parts = contents.parts(plan)
    factors = {}
    for target in plan.targets:
        mine = parts[target.name]
        start = mine["lora_A"], block_matrix(mine["lora_B"], target.groups)
        if method in REBUILT:
            start = _rebuilt(target, weights, plan)
        factors[target.name] = contents.factors(target, *start)
    modules = contents.trained_modules(plan)
    biases = contents.biases(plan)
    rows = {} if method in REBUILT else take_rows(base, contents.tensors)
    contents.refuse_surplus(_copies(contents, weights, plan, factors, modules))
    return LoadedAdapter(config, plan, weights, factors, parts, modules, biases, rows)


def _unknown_start(method: Any) -> str:
    if isinstance(method, str) and method.startswith(CHANGED):
        return (
            f"init_lora_weights={method!r} of an unconverted PEFT adapter is not supported: its "
            "initial factors cannot be computed again, since they depended on random numbers or "
            f"on data. {CONVERT}"
        )
    return (
        f"init_lora_weights={method!r} is not supported: this method of PEFT may change the base. "
        "If it keeps the base weights, set init_lora_weights to true in adapter_config.json. "
        f"Otherwise: {CONVERT}"
    )


def _warn_of_missing_layers(contents: Contents, config: LoraConfig, plan: Plan) -> None:
    """Warn if the configuration selects layers that the file does not contain."""
    if config.target_modules is None or config.target_modules == []:
        return
    config = dataclasses.replace(config, experts=False)
    try:
        chosen = select(contents.base, config, plan.modules_to_save).names
    except ValueError:  # the names do not match this model
        return
    present = {target.name for target in plan.targets}
    missing = [
        name
        for name in chosen
        if name not in present
        and module_type(contents.base.get_submodule(name)) in plan.initializer.modules
    ]
    if missing:
        warnings.warn(
            f"the adapter file contains nothing for {listed(missing)}, which target_modules "
            "selects. These layers keep their base weights without an adapter.",
            stacklevel=5,
        )


def _rebuilt(target: Target, weights: BaseWeights, plan: Plan) -> tuple[Tensor, Tensor]:
    """Compute the initial factors with the same decomposition as PEFT."""
    if FORMATS[target.module_type].operation == "lookup":
        rows, columns = target.shape
        return torch.zeros(target.rank, columns), torch.zeros(rows, target.rank)
    weight = widened(weights.present(target)).float()
    layer = Layer(
        names=(target.name,),
        kind=target.module_type,
        shape=target.shape,
        rank=target.rank,
        scaling=target.scaling,
        stored_weight=weight,
    )
    made = plan.initializer.function(layer, plan.options)
    return made.lora_A, made.lora_B


def _refuse_unlike_ours(target: Target, module: nn.Module, method: Any) -> None:
    """Raise if PEFT's layer or its base weight cannot be reproduced."""
    if not peft_computes(module, use_dora=False):
        raise ValueError(
            f"dilation={module.dilation} and padding_mode={module.padding_mode!r} of the "
            f"{target.module_type} {target.name!r} are not supported in a PEFT adapter: PEFT's "
            "lora_A ignores both, so this layer cannot compute the trained output. Leave the layer "
            "out and train again."
        )
    if method not in REBUILT:
        return
    how = None
    if target.experts is not None:
        how = "has no such start for experts"
    elif method == "olora" and target.module_type == "Conv1D":
        how = "decomposed without its transposition"
    elif target.quantized:
        how = "quantized again after the decomposition"
    elif target.shared_with:
        how = f"also changed in {target.shared_with[0]!r}, which shares it"
    if how is not None:
        raise ValueError(
            f"an unconverted {method} adapter of PEFT on the {target.module_type} {target.name!r} "
            f"is not supported: its base weight cannot be restored, since PEFT {how}. {CONVERT}"
        )


def _copies(
    contents: Contents,
    weights: BaseWeights,
    plan: Plan,
    factors: dict[str, Factors],
    modules: dict[str, dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The expected values of other tensors that PEFT may have written, by key."""
    base, left = contents.base, contents.tensors
    copies: dict[str, Tensor] = {}
    if not left:
        return copies
    for name, value in (*_named(base.named_parameters), *_named(base.named_buffers)):
        copies[f"{PREFIX}{name}"] = value
    for target in plan.targets:
        module, start = base.get_submodule(target.module), factors[target.name]
        for name, value in module.named_parameters():
            copies[f"{PREFIX}{target.name}.base_layer.{name}"] = value
        key = f"{PREFIX}{target.name}.base_layer.weight"
        if key not in left:
            continue
        if plan.initializer.base == "subtract":  # the file contains the residual
            product = low_rank_product(start.lora_A, start.lora_B, target.scaling)
            initial = widened(weights.present(target)) - product
            copies[key] = known_format(module).stored(module, initial)
    for name, state in modules.items():
        original = base.get_submodule(name).state_dict()
        for key, value in state.items():
            copies[f"{PREFIX}{name}.original_module.{key}"] = original[key]
            copies[f"{PREFIX}{name}.modules_to_save.{key}"] = value
    return copies


def _named(names: Callable[..., Iterable[tuple[str, Tensor]]]) -> Iterable[tuple[str, Tensor]]:
    """All names of each tensor, including tied ones; a state dict would repack 4-bit weights."""
    return names(remove_duplicate=False)
