"""Build a plan from a model and a configuration, and check all that does not depend on data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lora_init.config.lora_config import ALL_LINEAR, LoraConfig
from lora_init.plan.attention import attention_of
from lora_init.plan.check import (
    FLOAT_DTYPES,
    check_access,
    check_groups,
    check_module,
    check_target_rank,
    check_trained,
    check_values,
    computes_product,
    extents,
    rank_excess,
    sharers,
    unobserved,
    warn_of_float16,
)
from lora_init.plan.expert_names import pefts_names
from lora_init.plan.left_out import LeftOut, described, left_out
from lora_init.plan.match import PatternValues, Selection, select
from lora_init.plan.parameters import fused_parameters
from lora_init.plan.plan import Plan, Target
from lora_init.plan.sharded import check_sharded_variants
from lora_init.plan.state_space import read_by_kernel, rescaled_in_place
from lora_init.registry import CalibrationRequest, Initializer
from lora_init.weights.format import WEIGHT, WeightFormat
from lora_init.weights.kinds import FORMATS, is_quantized, known_format, module_type
from lora_init.weights.sharded import reshard

QUANTIZED_BASES = ("in_forward", "requantize")
UNSUPPORTED = {
    "routed": {
        "use_dora": (
            False,
            "DoRA divides by the norms of W + s B A, which the forward pass of experts never forms",
        ),
        "lora_bias": (False, "adapter files of experts have PEFT's layout, which has no bias"),
    },
    "selection": {
        "use_dora": (False, "adapter files of routers have PEFT's layout, which has no magnitude"),
        "lora_bias": (False, "adapter files of routers have PEFT's layout, which has no bias"),
        "lora_dropout": (0, "a router runs with the weight W + s B A, so A has no input to drop"),
    },
}
"""The settings that experts and routers do not support: the value that turns each off, and why."""


def check_model(model: Any) -> None:
    """Raise if `model` is not a torch module, for example if it is a model's name.

    Raises:
        TypeError: names the type.
        ValueError: a parameter is uninitialized.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model={model!r} is not supported: must be a torch.nn.Module, not a "
            f"{type(model).__name__}. Load the model first, e.g. with "
            "AutoModelForCausalLM.from_pretrained(name)."
        )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{name!r} of the model has no shape yet (a lazy module, such as LazyLinear). Run "
                "one forward pass before adding an adapter."
            )


def checked_config(setting: str, config: Any) -> LoraConfig:
    """Validate a configuration again, because its fields may have been edited; return a copy.

    Raises:
        TypeError: it is not a `lora_init.LoraConfig`.
        ValueError: a field has a value that is not supported.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"{setting} is a {type(config).__module__}.{type(config).__name__}; pass "
            "a lora_init.LoraConfig (LoraConfig.from_dict(config.to_dict()) converts PEFT's)"
        )
    return config.checked()


def make_plan(
    model: nn.Module,
    config: LoraConfig,
    adapter_dtype: torch.dtype = torch.float32,
    *,
    quantized_base: str = "in_forward",
    calibration_memory: int | None = None,
    any_rank: bool = False,
    modules_to_save: Sequence[str] | None = None,
) -> Plan:
    """Build the plan and check all that can be known before statistics are collected.

    Args:
        any_rank: skip the rank checks. An adapter from a file needs no initialization.
        modules_to_save: full names, as for `lora_init.plan.match.select`.

    Raises:
        ValueError: as `lora_init.plan.match.select`; a rank that a layer or the method does not
            support; a weight that is not supported (sharded, or packed and on the meta device); a
            module or bias to train that has no values.
        TypeError: a module type that the method does not support.
    """
    if adapter_dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"adapter_dtype={adapter_dtype!r} is not supported: must be one of "
            f"{', '.join(map(str, FLOAT_DTYPES))}"
        )
    if quantized_base not in QUANTIZED_BASES:
        raise ValueError(
            f"quantized_base={quantized_base!r} is not supported: must be one of "
            f"{', '.join(QUANTIZED_BASES)}"
        )
    spec, options = config.initializer()
    reshard(model)
    selection = select(model, config, modules_to_save)
    owners = extents(model)
    ranks = PatternValues("rank_pattern", config.rank_pattern, config.r)
    alphas = PatternValues("alpha_pattern", config.alpha_pattern, config.lora_alpha)
    everything = config.target_modules == ALL_LINEAR
    omitted = [] if any_rank else left_out(model, config, selection)
    targets = []
    for name, owner, matrix in _matrices(model, selection):
        module = model.get_submodule(owner)
        reason = read_by_kernel(model, owner) or rescaled_in_place(model, owner)
        is_implied = name in selection.implied
        may_omit = (everything and matrix == WEIGHT) or (is_implied and config.experts is None)
        if reason is not None and not everything:
            raise ValueError(
                f"target_modules: {name!r} is not supported: {reason}. Leave it out, e.g. with "
                f"exclude_modules=[{'.'.join(name.split('.')[-2:])!r}]."
            )
        if reason is not None:
            omitted.append(LeftOut(name, type(module).__name__, reason))
            continue
        try:
            check_module(model, owner, spec, matrix)
            check_access(
                name, module, spec, options, use_dora=config.use_dora,
                requantizes=spec.base == "subtract" and quantized_base == "requantize",
            )  # fmt: skip
            reason = unobserved(model, owner, spec) if everything else None
            _check_variants(config, name, known_format(module))
        except TypeError as error:
            if not may_omit:
                raise
            reason = str(error).removeprefix(f"target {name!r}").lstrip(": ")
        if reason is not None:
            omitted.append(LeftOut(name, type(module).__name__, reason))
            continue
        stored = known_format(module)
        *experts, rows, columns = stored.shape(module, matrix)
        shape = rows, columns
        if not rows * columns:
            if not (everything or may_omit):
                raise ValueError(
                    f"target {name!r} is not supported: its weight is empty ({rows}×{columns}). "
                    "Leave it out with exclude_modules."
                )
            reason = f"its weight is empty ({rows}×{columns})"
            omitted.append(LeftOut(name, type(module).__name__, reason))
            continue
        attention = attention_of(model, owner)
        selected = attention or name
        factor = 2 if name in selection.doubled and not ranks.matches(name) else 1
        rank, groups = factor * ranks(selected), stored.groups(module)
        if groups > 1:
            check_groups(name, rank, shape, groups, spec, options, any_rank=any_rank)
        elif not any_rank:
            narrow = rank_excess(rank, shape, spec)
            if narrow and (everything or may_omit) and not ranks.matches(selected):
                omitted.append(LeftOut(name, type(module).__name__, _too_narrow(spec, rank, shape)))
                continue
            check_target_rank(name, rank, shape, spec, options)
        alpha = factor * alphas(selected)
        targets.append(
            Target(
                name=name,
                module_type=stored.name,
                shape=shape,
                dtype=stored.describe(module),
                rank=rank,
                alpha=alpha,
                scaling=config.scaling(rank, alpha),
                quantized=stored.quantized,
                shared_with=sharers(owner, module, owners, matrix),
                exact=computes_product(name, module),
                groups=groups,
                attention=attention,
                matrix=matrix,
                experts=experts[0] if experts else None,
            )
        )
    if not targets:
        raise ValueError(
            f"target_modules={config.target_modules!r} leaves nothing to adapt in "
            f"{type(model).__name__}: {'; '.join(described(omitted))}"
        )
    if config.fan_in_fan_out and all(target.module_type == "Linear" for target in targets):
        warnings.warn(
            "fan_in_fan_out=True, but every target is an nn.Linear, which stores (out, in); the "
            "setting is ignored, because the module's class decides",
            stacklevel=3,
        )
    check_sharded_variants(
        model,
        [target.name for target in targets],
        use_dora=config.use_dora,
        lora_bias=config.lora_bias,
        lora_dropout=config.lora_dropout,
        bias=config.bias,
        modules_to_save=selection.modules_to_save,
    )
    for name in selection.modules_to_save:
        check_trained(model, name, owners)
        inside = dict(model.get_submodule(name).named_modules(prefix=name))
        check_values("modules_to_save", model.get_submodule(name).named_parameters(name))
        quantized = [path for path, module in inside.items() if is_quantized(module)]
        if quantized:
            raise ValueError(
                f"modules_to_save: {quantized[0]!r} is a {module_type(inside[quantized[0]])}, "
                "whose codes cannot be trained; load the model with "
                f"llm_int8_skip_modules=[{name.rpartition('.')[2]!r}] in its quantization_config"
            )
    _check_quantizers(model, config.bias, targets)
    embeddings = [t.name for t in targets if FORMATS[t.module_type].operation == "lookup"]
    if config.lora_bias and embeddings:
        raise ValueError(
            f"lora_bias=True with the Embedding {embeddings[0]!r}: an embedding has no bias; leave "
            "it out (exclude_modules), or lora_bias=False"
        )
    trained_biases = _trained_biases(model, config.bias, targets, selection.modules_to_save)
    biases = [(name, model.get_parameter(name)) for name in trained_biases]
    check_values(f"bias={config.bias!r}", biases)
    warn_of_float16(f"bias={config.bias!r}", biases)
    plan = Plan(
        initializer=spec,
        options=options,
        targets=tuple(targets),
        modules_to_save=selection.modules_to_save,
        calibration=spec.request(options),
        unmatched=selection.unmatched,
        candidates=selection.candidates,
        adapter_dtype=adapter_dtype,
        quantized_base=quantized_base,
        calibration_memory=calibration_memory,
        trained_biases=trained_biases,
        bias=config.bias,
        dropout=config.lora_dropout,
        use_dora=config.use_dora,
        lora_bias=config.lora_bias,
        left_out=tuple(omitted),
        fused=tuple(fused_parameters(model)),
        mapped=_mapped(model, [target.name for target in targets if target.experts is None]),
    )
    if plan.calibration is not None:
        _check_memory(plan, plan.calibration)
    return plan


def _check_variants(config: LoraConfig, name: str, stored: WeightFormat) -> None:
    """Raise TypeError if a setting is not supported on experts or routers."""
    for setting, (neutral, reason) in UNSUPPORTED.get(stored.operation, {}).items():
        if (value := getattr(config, setting)) != neutral:
            raise TypeError(
                f"target {name!r}: {setting}={value!r} is not supported with {stored.name}: must "
                f"be {neutral!r}, because {reason}. Set {setting}={neutral!r}, or leave the target "
                "out with exclude_modules"
            )


def _mapped(model: nn.Module, targets: list[str]) -> tuple[str, ...]:
    """The targets that PEFT would take for experts, because it maps their last name part."""
    return tuple(name for name in targets if name.rpartition(".")[2] in pefts_names(model))


def _matrices(model: nn.Module, selection: Selection) -> list[tuple[str, str, str]]:
    """For each selected matrix in model order: its name, its module, and its name there."""
    found = [(name, name, WEIGHT) for name in selection.names]
    for name in selection.experts:
        owner, _, matrix = name.rpartition(".")
        found.append((name, owner, matrix))
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda one: places[one[1]])


def _check_memory(plan: Plan, request: CalibrationRequest) -> None:
    """Raise if a memory limit is below what a single layer needs."""
    memory = plan.calibration_memory
    if memory is None:
        return
    if isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0:
        raise ValueError(
            f"calibration_memory={memory!r} is not supported: must be None or a number of bytes, "
            "an int > 0"
        )
    name = plan.initializer.name
    if plan.sketches_gradients:
        needed, why = plan.statistics_bytes, f"sketches of the gradients for {name}"
    elif request.gradients:
        needed, why = plan.statistics_bytes, f"{name}'s gradients, which one pass collects,"
    elif plan.initializer.allocates and plan.directions(plan.targets[0]) is None:
        needed, why = plan.statistics_bytes, f"{name}, which needs all statistics to choose ranks,"
    else:
        widest = max(plan.targets, key=plan.input_bytes)
        sets = len(request.sets) or 1
        needed, why = sets * plan.input_bytes(widest), f"the inputs of {widest.name!r} alone"
    if memory < needed:
        raise ValueError(
            f"calibration_memory={memory}: {why} take {needed} bytes; pass as many, or None"
        )


def _too_narrow(spec: Initializer, rank: int, shape: tuple[int, int]) -> str:
    return (
        f"{spec.name} cannot have rank {rank} on a {shape[0]}×{shape[1]} weight; to adapt it, give "
        f"it a rank of at most {min(shape)} in rank_pattern"
    )


def _check_quantizers(model: nn.Module, bias: str, targets: list[Target]) -> None:
    """Refuse to train biases that a quantizer fixes; warn of layers that pass on no gradient.

    Raises:
        ValueError: the bias of a target is to be trained and is not a parameter.
    """
    modules = {t.name: model.get_submodule(t.name) for t in targets if t.quantized}
    for name, module in modules.items():
        own = getattr(module, "bias", None)
        if bias != "none" and own is not None and not isinstance(own, nn.Parameter):
            raise ValueError(
                f"bias={bias!r} is not supported for target {name!r}: its bias is not a parameter, "
                f"but a buffer of the {type(module).__name__}. Use bias='none', or leave the "
                "target out with exclude_modules"
            )
    blocking = [name for name, one in modules.items() if known_format(one).blocks_gradient(one)]
    if blocking:
        warnings.warn(
            f"{len(blocking)} targets quantize their inputs, the first is {blocking[0]!r}: their "
            "forward passes give no gradient to earlier layers, which then train or are calibrated "
            "with a wrong gradient. Load the model with a quantizer of weights only",
            stacklevel=4,
        )


def _trained_biases(
    model: nn.Module, bias: str, targets: list[Target], modules_to_save: tuple[str, ...]
) -> tuple[str, ...]:
    """The biases to train, without those of modules to save, which are trained there.

    As in PEFT, the bias of an attention's input projection, `in_proj_bias`, is not trained.
    """
    if bias == "none":
        return ()
    fixed = {f"{target.attention}.in_proj.bias" for target in targets}
    names = [name for name, _ in model.named_parameters() if name not in fixed]
    if bias == "lora_only":
        adapted = {f"{target.name}.bias" for target in targets}
        return tuple(name for name in names if name in adapted)
    whole = tuple(f"{name}." for name in modules_to_save)
    return tuple(n for n in names if n.rpartition(".")[2] == "bias" and not n.startswith(whole))
