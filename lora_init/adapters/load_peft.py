"""PEFT's files: plain adapters, and those whose base a decomposition changed.

What PEFT 0.21.2 writes besides the adapter, and where its layers compute something else than the
tensors say:

- Where target_modules names "embed_tokens" or "lm_head", the file holds the base's own weight of
  it too, `….base_layer.weight`; a resized vocabulary brings both embeddings. Ours are the base's.
- bias="all" beside modules_to_save writes a saved module's bias three times: as `<module>.bias`, as
  `<module>.modules_to_save.bias`, and the untouched one as `<module>.original_module.bias`. Former
  versions wrote whatever has "bias" in its name, as T5's `relative_attention_bias.weight`.
- "pissa" and "olora" start an embedding as True does, and keep its weight.
- A of a Conv2d has the base's stride and padding, not its dilation and padding mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from lora_init.adapters.edited import KEPT_STARTS, listed
from lora_init.adapters.embeddings import take_rows
from lora_init.adapters.format import PREFIX, peft_computes
from lora_init.adapters.loaded import LoadedAdapter
from lora_init.adapters.saved_modules import in_file
from lora_init.adapters.tensors import Contents
from lora_init.config.file import method_of
from lora_init.config.lora_config import LoraConfig
from lora_init.factors import Factors, low_rank_product
from lora_init.layer import Layer
from lora_init.linalg.matrix import widened
from lora_init.plan.match import select
from lora_init.plan.plan import Plan, Target
from lora_init.weights.kinds import module_type, stored_weight
from lora_init.weights.source import BaseWeights

REBUILT = ("pissa", "olora")
CHANGED = ("pissa", "olora", "corda", "lora_ga")

CONVERT = "convert it with PEFT's path_initial_model_for_weight_conversion first"


def read_foreign(contents: Contents, weights: BaseWeights, values: dict[str, Any]) -> LoadedAdapter:
    """Check PEFT's file against the base; `values` are its adapter_config.json."""
    base = contents.base
    method = method_of(values.get("init_lora_weights"))
    method = True if method is None else method
    if method not in KEPT_STARTS and method not in REBUILT:
        raise ValueError(_unknown_start(method))
    values = dict(values)
    # How a kept adapter was started does not matter any more, and PEFT's options may be at values
    # that we would refuse to run.
    values["init_lora_weights"] = method if method in REBUILT else True
    if method == "olora" and any(key.endswith(".lora_embedding_A") for key in contents.tensors):
        raise ValueError(f"an unconverted olora adapter of PEFT has an embedding; {CONVERT}")
    config = LoraConfig.from_dict(values)
    if method == "pissa":
        config.init_lora_weights = {"name": "pissa", "method": "exact"}
    written = config
    saved = in_file(base, contents.tensors, contents.layers, config)
    config, plan = contents.plan(config, modules_to_save=saved)
    _warn_of_missing_layers(contents, written, plan)
    weights.check_unloaded(plan.targets)
    for target in plan.targets:
        _refuse_unlike_ours(target, base.get_submodule(target.name), method)
    if method == "loftq":
        warnings.warn(
            "a PEFT adapter with init_lora_weights='loftq' corrects the error of a base that PEFT "
            "quantised when it trained; it is right on that quantised base only",
            stacklevel=4,
        )
    parts = contents.parts(plan)
    factors = {}
    for target in plan.targets:
        mine = parts[target.name]
        start = mine["lora_A"], mine["lora_B"]
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
            f"a PEFT adapter with init_lora_weights={method!r} changed its base by factors that "
            f"cannot be computed again (they depended on a random stream or on data); {CONVERT}"
        )
    return (
        f"init_lora_weights={method!r} is not supported: whether this method of PEFT changes the "
        "base is not known. If it leaves the base weights alone, set init_lora_weights to true in "
        f"adapter_config.json; else {CONVERT}"
    )


def _warn_of_missing_layers(contents: Contents, config: LoraConfig, plan: Plan) -> None:
    """Warn where the configuration selects more layers than the file holds."""
    if config.target_modules is None or config.target_modules == []:
        return
    try:
        chosen = select(contents.base, config, plan.modules_to_save).names
    except ValueError:  # names of the file's own, or none that match here
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
            f"the adapter file holds nothing for {listed(missing)}, which target_modules selects; "
            "these layers stay as they are in the base model",
            stacklevel=5,
        )


def _rebuilt(target: Target, weights: BaseWeights, plan: Plan) -> tuple[Tensor, Tensor]:
    """The initial factors, by the decomposition that PEFT took."""
    if target.module_type == "Embedding":
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
    """Refuse adapters whose layers, or whose bases, PEFT made otherwise than we can."""
    if not peft_computes(module):
        raise ValueError(
            f"a PEFT adapter on the Conv2d {target.name!r} with dilation={module.dilation}, "
            f"padding_mode={module.padding_mode!r}: PEFT's lora_A has neither, so the trained "
            "function is none that this layer's adapter could compute"
        )
    if method not in REBUILT:
        return
    how = None
    if method == "olora" and target.module_type == "Conv1D":
        how = "decomposed without regard to its orientation"
    elif target.quantized:
        how = "quantised anew after it had been decomposed"
    elif target.shared_with:
        how = f"changed in {target.shared_with[0]!r} too, which shares it"
    if how is not None:
        raise ValueError(
            f"an unconverted {method} adapter of PEFT on the {target.module_type} "
            f"{target.name!r}, whose weight PEFT {how}: its base cannot be rebuilt; {CONVERT}"
        )


def _copies(
    contents: Contents,
    weights: BaseWeights,
    plan: Plan,
    factors: dict[str, Factors],
    modules: dict[str, dict[str, Tensor]],
) -> dict[str, Tensor]:
    """What PEFT may have written besides, by key, for the keys that are left."""
    base, left = contents.base, contents.tensors
    copies: dict[str, Tensor] = {}
    if not left:
        return copies
    for name, value in (*_named(base.named_parameters), *_named(base.named_buffers)):
        copies[f"{PREFIX}{name}"] = value
    for target in plan.targets:
        module, start = base.get_submodule(target.name), factors[target.name]
        for name, value in module.named_parameters():
            copies[f"{PREFIX}{target.name}.base_layer.{name}"] = value
        key = f"{PREFIX}{target.name}.base_layer.weight"
        if key not in left:
            continue
        if plan.initializer.base == "subtract":  # there it is the residual
            product = low_rank_product(start.lora_A, start.lora_B, target.scaling)
            copies[key] = stored_weight(module, widened(weights.present(target)) - product)
    for name, state in modules.items():
        original = base.get_submodule(name).state_dict()
        for key, value in state.items():
            copies[f"{PREFIX}{name}.original_module.{key}"] = original[key]
            copies[f"{PREFIX}{name}.modules_to_save.{key}"] = value
    return copies


def _named(names: Callable[..., Iterable[tuple[str, Tensor]]]) -> Iterable[tuple[str, Tensor]]:
    """With all names of a tied tensor. Not the state dict, which repacks 4-bit modules."""
    return names(remove_duplicate=False)
