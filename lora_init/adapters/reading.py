"""Reading an adapter, ours or PEFT's, and checking it against a base; see the package."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_init.adapters.names import HEADER_KEY, OWN_WEIGHTS_NAME, PREFIX, WEIGHTS_NAME
from lora_init.config import CONFIG_NAME, METHOD_CONFIGS, LoraConfig
from lora_init.factors import Factors, Replacement
from lora_init.fingerprint import has_fingerprint
from lora_init.injection import Injection
from lora_init.layers import widened
from lora_init.modules import oriented_weight
from lora_init.plan import Plan, Target, make_plan
from lora_init.quantization import Quantizer
from lora_init.targets import exactly

# PEFT's methods that leave the base alone: their files are plain adapters.
PEFT_KEPT = (True, False, "gaussian", "eva", "orthogonal", "loftq")
PEFT_REBUILT = ("pissa", "olora")


@dataclass
class LoadedAdapter:
    """A file that has been read and checked against a base model.

    Attributes:
        config, plan: the settings, and the targets found in the base.
        factors: what `inject` needs: initial factors where they are known, else the trained ones.
        trained_factors: the trained (A, B) by target name.
        trained_modules: tensors of the modules trained whole, by module and parameter name.
    """

    config: LoraConfig
    plan: Plan
    factors: dict[str, Factors]
    trained_factors: dict[str, tuple[Tensor, Tensor]]
    trained_modules: dict[str, dict[str, Tensor]]
    checksums: dict[str, str]


def read(folder: Path, base: nn.Module, adapter_dtype: torch.dtype) -> LoadedAdapter:
    """Read an adapter's files and check every tensor against `base`; nothing is changed.

    Raises:
        FileNotFoundError: no configuration, or no safetensors file (pickles are not loaded).
        ValueError: a damaged file, a tensor that is missing, surplus, mis-shaped or non-finite,
            another base model, or an adapter of PEFT that cannot be rebuilt; by name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; pass one that save_pretrained wrote")
    values = _config_values(folder)
    tensors, header = _tensors(folder)
    if header is not None:
        return _read_own(folder, base, tensors, header, adapter_dtype)
    return _read_peft(base, tensors, values, adapter_dtype)


def fill(injection: Injection, loaded: LoadedAdapter) -> None:
    """Copy the trained values into a model injected with the loaded adapter's factors."""
    for name, expected in loaded.checksums.items():
        if injection.checksums[name] != expected:
            warnings.warn(
                f"the quantised base of {name!r} differs in some codes from the one the adapter "
                "was trained on (another machine's arithmetic); outputs may move by one "
                "quantisation step in few weights",
                stacklevel=3,
            )
    with torch.no_grad():
        for name, (lora_A, lora_B) in loaded.trained_factors.items():
            injection.layers[name].lora_A.copy_(lora_A)
            injection.layers[name].lora_B.copy_(lora_B)
        for name, state in loaded.trained_modules.items():
            injection.trained[name].trained_module.load_state_dict(state)


def _config_values(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG_NAME} in {str(folder)!r}; pass an adapter's folder")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the file is damaged") from error


def _tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    path = folder / OWN_WEIGHTS_NAME
    if not path.is_file():
        path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which is never loaded; convert it with PEFT)"
        hint = pickled if (folder / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {str(folder)!r}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = json.loads(metadata[HEADER_KEY]) if HEADER_KEY in metadata else None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy or save it again") from error
    for key, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: tensor {key!r} holds NaN or infinite values")
    return tensors, header


def _read_own(
    folder: Path,
    base: nn.Module,
    tensors: dict[str, Tensor],
    header: Mapping[str, Any],
    adapter_dtype: torch.dtype,
) -> LoadedAdapter:
    if header.get("format_version") != 1:
        raise ValueError(
            f"{str(folder)!r} was written in format {header.get('format_version')!r}; this "
            "version of lora_init reads format 1"
        )
    config = LoraConfig.from_dict(header["config"])
    config.init_lora_weights = header["method"]
    config.eva_config, config.corda_config, config.loftq_config = None, None, {}
    plan = _plan_for(base, config, tensors, adapter_dtype)
    doubled = 2 if plan.initializer.base == "subtract" else 1
    trained = _factor_pairs(plan, tensors, doubled)
    factors = {}
    for target in plan.targets:
        lora_A, lora_B = trained[target.name]
        replacement = None
        if plan.initializer.base == "subtract":
            r = target.rank
            initial = lora_A[r:].contiguous(), -lora_B[:, r:].contiguous()
            trained[target.name] = lora_A[:r], lora_B[:, :r]
            lora_A, lora_B = initial
        elif plan.initializer.base == "replace":
            replacement = _replacement(target, tensors, header, base)
        factors[target.name] = _placed(base, target, lora_A, lora_B, adapter_dtype, replacement)
    modules = _trained_modules(base, plan, tensors)
    _refuse_surplus(tensors)
    _compare_base(base, plan, header.get("fingerprints", {}))
    return LoadedAdapter(config, plan, factors, trained, modules, header.get("checksums", {}))


def _read_peft(
    base: nn.Module,
    tensors: dict[str, Tensor],
    values: dict[str, Any],
    adapter_dtype: torch.dtype,
) -> LoadedAdapter:
    method = values.get("init_lora_weights", True)
    if method not in PEFT_KEPT and method not in PEFT_REBUILT:
        raise ValueError(
            f"a PEFT adapter with init_lora_weights={method!r} changed its base by factors that "
            "cannot be computed again (they depended on a random stream or on data); convert it "
            "with PEFT's path_initial_model_for_weight_conversion first"
        )
    values = dict(values)
    # How a kept adapter was started does not matter any more, and PEFT's options may be at values
    # that we would refuse to run.
    values["init_lora_weights"] = method if method in PEFT_REBUILT else True
    for name in METHOD_CONFIGS:
        values.pop(f"{name}_config", None)
    config = LoraConfig.from_dict(values)
    if method == "pissa":
        config.init_lora_weights = {"name": "pissa", "method": "exact"}
    plan = _plan_for(base, config, tensors, adapter_dtype)
    if method == "olora" and any(target.module_type == "Conv1D" for target in plan.targets):
        raise ValueError(
            "an unconverted olora adapter of PEFT on Conv1D layers: PEFT decomposed their weights "
            "without regard to the orientation, and its base cannot be rebuilt; convert it with "
            "PEFT's path_initial_model_for_weight_conversion first"
        )
    if method == "loftq":
        warnings.warn(
            "a PEFT adapter with init_lora_weights='loftq' corrects the error of a base that PEFT "
            "quantised when it trained; it is right on that quantised base only",
            stacklevel=4,
        )
    trained = _factor_pairs(plan, tensors, 1)
    factors = {}
    for target in plan.targets:
        lora_A, lora_B = trained[target.name]
        if method in PEFT_REBUILT:
            weight = widened(oriented_weight(base.get_submodule(target.name))).float()
            rebuilt = plan.initializer.function(
                weight, target.rank, target.scaling, None, plan.options, torch.Generator()
            )
            lora_A, lora_B = rebuilt.lora_A, rebuilt.lora_B
        factors[target.name] = _placed(base, target, lora_A, lora_B, adapter_dtype, None)
    modules = _trained_modules(base, plan, tensors)
    _refuse_surplus(tensors)
    return LoadedAdapter(config, plan, factors, trained, modules, {})


def _plan_for(
    base: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], adapter_dtype: torch.dtype
) -> Plan:
    """The plan whose targets are the layers named in the file, all of which must exist."""
    suffix = ".lora_A.weight"
    names = [k[len(PREFIX) : -len(suffix)] for k in tensors if k.endswith(suffix)]
    if not names:
        raise ValueError("the adapter file holds no lora_A; it is no LoRA adapter, or damaged")
    modules = dict(base.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(
                f"the adapter has a layer {name!r}, which {type(base).__name__} does not have; "
                "load the base model it was trained on"
            )
    by_name = dataclasses.replace(
        config,
        target_modules=exactly(names),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    plan = make_plan(base, by_name, adapter_dtype)
    missing = set(names) - {target.name for target in plan.targets}
    if missing:
        raise ValueError(
            f"the adapter's layer {sorted(missing)[0]!r} lies inside modules_to_save="
            f"{config.modules_to_save!r}; the files contradict each other"
        )
    return plan


def _factor_pairs(
    plan: Plan, tensors: dict[str, Tensor], doubled: int
) -> dict[str, tuple[Tensor, Tensor]]:
    pairs = {}
    for target in plan.targets:
        rows, columns = target.shape
        rank = doubled * target.rank
        pairs[target.name] = (
            _take(tensors, f"{target.name}.lora_A.weight", (rank, columns)),
            _take(tensors, f"{target.name}.lora_B.weight", (rows, rank)),
        )
    return pairs


def _take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    key = PREFIX + name
    if key not in tensors:
        raise ValueError(f"the adapter file lacks {key!r}; it is damaged or incomplete")
    if tuple(tensors[key].shape) != shape:
        raise ValueError(
            f"{key!r} has shape {tuple(tensors[key].shape)}, this base model and rank need "
            f"{shape}; load the base model the adapter was trained on"
        )
    return tensors.pop(key)


def _replacement(
    target: Target, tensors: dict[str, Tensor], header: Mapping[str, Any], base: nn.Module
) -> Replacement:
    rows, columns = target.shape
    device = base.get_submodule(target.name).weight.device
    lora_A = _take(tensors, f"{target.name}.replacement_A", (target.rank, columns))
    lora_B = _take(tensors, f"{target.name}.replacement_B", (rows, target.rank))
    quantizer = Quantizer.from_dict(header["quantizer"])
    return Replacement(quantizer, lora_A.to(device), lora_B.to(device))


def _placed(
    base: nn.Module,
    target: Target,
    lora_A: Tensor,
    lora_B: Tensor,
    dtype: torch.dtype,
    replacement: Replacement | None,
) -> Factors:
    device = base.get_submodule(target.name).weight.device
    return Factors(lora_A.to(device, dtype), lora_B.to(device, dtype), replacement)


def _trained_modules(
    base: nn.Module, plan: Plan, tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    states = {}
    for name in plan.modules_to_save:
        states[name] = {
            key: _take(tensors, f"{name}.{key}", tuple(value.shape))
            for key, value in base.get_submodule(name).state_dict().items()
        }
    return states


def _refuse_surplus(tensors: Mapping[str, Tensor]) -> None:
    for key in tensors:
        raise ValueError(
            f"the adapter file holds {key!r}, which its configuration and this base model have no "
            "place for; DoRA, biases and embeddings are not served yet"
        )


def _compare_base(base: nn.Module, plan: Plan, fingerprints: Mapping[str, str]) -> None:
    for target in plan.targets:
        expected = fingerprints.get(target.name)
        if expected is None or has_fingerprint(base.get_submodule(target.name), expected):
            continue
        message = (
            f"the base weight of {target.name!r} is not the one the adapter was trained on; load "
            "the original base model"
        )
        if plan.initializer.base == "replace":
            raise ValueError(message + " (its quantised base is rebuilt from these weights)")
        warnings.warn(message, stacklevel=4)
        return
