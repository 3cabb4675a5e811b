"""Load adapters that lora_init saved; their header allows training to continue."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lora_init.adapters.core_file import Cores, checked_core
from lora_init.adapters.edited import followed
from lora_init.adapters.embeddings import check_vocabulary, take_rows
from lora_init.adapters.format import halved_rank
from lora_init.adapters.header import check_header
from lora_init.adapters.loaded import LoadedAdapter
from lora_init.adapters.saved_modules import in_file
from lora_init.adapters.tensors import Contents
from lora_init.config.lora_config import LoraConfig
from lora_init.factors import Replacement, block_matrix
from lora_init.plan.plan import Plan, Target
from lora_init.plan.tables import listed
from lora_init.quantization import Quantizer
from lora_init.weights.fingerprint import has_fingerprint
from lora_init.weights.kinds import known_format
from lora_init.weights.source import BaseWeights

FORMAT_VERSION = 1


def read_own(
    contents: Contents,
    weights: BaseWeights,
    header: Mapping[str, Any],
    values: Mapping[str, Any],
    cores: Cores | None = None,
) -> LoadedAdapter:
    """Check a file against the base.

    Args:
        values: the content of its adapter_config.json.
        cores: B and R of the layers of a method with a core; None loads B R as a plain LoRA.
    """
    check_header(header, FORMAT_VERSION)
    config = _config(header)
    if cores is None and config.initializer()[0].has_core:
        config.init_lora_weights = True
    saved = header.get("modules_to_save")
    if saved is None:  # the file of a PEFT model: apply PEFT's rule
        saved = in_file(contents.base, contents.tensors, contents.layers, config)
    else:
        contents.drop(contents.in_base(header.get("copied_modules", [])))
        saved = contents.in_base(saved)
    quantizers = _quantizers(header)
    settings = header.get("quantized_base", "in_forward"), saved
    config, plan = contents.plan(config, *settings)
    _refuse_missing_layers(contents, plan, header.get("fingerprints", {}))
    doubled = 2 if plan.initializer.base == "subtract" and not quantizers else 1
    edited = followed(contents, config, plan, values, doubled, fixed=bool(quantizers))
    if edited is not config:
        config, plan = contents.plan(edited, *settings)
    weights = _originals(weights, plan, header, contents)
    weights.check_unloaded(plan.targets)
    parts = contents.parts(plan, doubled)
    factors = {}
    for target in plan.targets:
        mine, r = parts[target.name], target.rank
        name = contents.names(target.name)
        lora_A, lora_B = mine["lora_A"], block_matrix(mine["lora_B"], target.groups)
        replacement, core = None, None
        if doubled == 2:
            halves = halved_rank(lora_A, mine["lora_B"], target.groups)
            mine["lora_A"], mine["lora_B"] = halves[:2]
            lora_A, lora_B = (half.contiguous() for half in halves[2:])
        elif name in quantizers:
            replacement = Replacement(
                quantizers[name],
                contents.part(target, "replacement_A", r),
                contents.part(target, "replacement_B", r),
                header.get("checksums", {}).get(name),
            )
            _check_quantizer(target, contents.base.get_submodule(target.module), replacement)
        elif plan.initializer.base == "subtract":
            lora_A = contents.part(target, "initial_A", r)
            lora_B = contents.part(target, "initial_B", r)
        elif cores is not None:
            lora_B, core = checked_core(name, cores, lora_B, r)
            mine |= {"lora_B": lora_B, "lora_core": core}
        factors[target.name] = contents.factors(target, lora_A, lora_B, replacement, core)
    modules = contents.trained_modules(plan)
    biases = contents.biases(plan)
    rows = take_rows(contents.base, contents.tensors)
    contents.refuse_surplus()
    replaced_rows = {name.rpartition(".")[0] for name in rows}
    fingerprints = header.get("fingerprints", {})
    _compare_base(weights, plan, fingerprints, quantizers, contents, replaced_rows)
    known = {*replaced_rows, *modules, *(target.name for target in plan.targets)}
    recorded = header.get("vocabulary", {})
    names = dict(zip(contents.in_base(recorded), recorded.values(), strict=True))
    check_vocabulary(contents.base, names, known)
    checksums = header.get("checksums", {})
    checksums = {
        target.name: checksums[contents.names(target.name)]
        for target in plan.targets
        if contents.names(target.name) in checksums
    }
    return LoadedAdapter(config, plan, weights, factors, parts, modules, biases, rows, checksums)


def _config(header: Mapping[str, Any]) -> LoraConfig:
    """The configuration of the training.

    Raises:
        ValueError: the configuration in the header is damaged.
    """
    try:
        config = LoraConfig.from_dict(header["config"])
        config.init_lora_weights = header["method"]
        config.eva_config, config.corda_config, config.loftq_config = None, None, {}
        config.initializer()
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"the header of the adapter file is damaged ({error!r})") from error
    return config


def _quantizers(header: Mapping[str, Any]) -> dict[str, Quantizer]:
    try:
        return {
            name: Quantizer.from_dict(values)
            for name, values in header.get("quantizers", {}).items()
        }
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the quantizers of the adapter file are damaged ({error!r})") from error


def _refuse_missing_layers(contents: Contents, plan: Plan, fingerprints: Mapping[str, str]) -> None:
    """Raise if the file lacks all tensors of a layer that has a fingerprint in the header.

    Raises:
        ValueError: layers are missing. The message names them.
    """
    present = {contents.names(target.name) for target in plan.targets}
    missing = sorted(fingerprints.keys() - present)
    if missing:
        raise ValueError(
            f"the adapter file lacks all tensors of {listed(missing)}, which were adapted when it "
            "was saved. The file is damaged or incomplete. Copy it or save it again."
        )


def _originals(
    weights: BaseWeights, plan: Plan, header: Mapping[str, Any], contents: Contents
) -> BaseWeights:
    """Select and check the weights from which the replaced base weights are computed.

    Raises:
        ValueError: the unquantized checkpoint is missing, or is another one.
    """
    needed = header.get("from_original_weights")
    if not needed:
        # The values of the quantized base were quantized again, not those of the checkpoint.
        quantized = any(target.quantized for target in plan.targets)
        return BaseWeights(weights.model, None) if quantized else weights
    if weights.originals is None:
        raise ValueError(
            f"the base of {next(iter(needed))!r} was quantized from the unquantized checkpoint. "
            "Pass original_weights=<its folder>."
        )
    weights.check(plan.targets)
    for target in plan.targets:
        expected = needed.get(contents.names(target.name))
        if expected is not None and not has_fingerprint(weights.weight(target), expected):
            raise ValueError(
                f"original_weights: the weight of {target.name!r} is not the one from which the "
                "base of the adapter was quantized. Pass the checkpoint of the training."
            )
    return weights


def _check_quantizer(target: Target, module: nn.Module, replacement: Replacement) -> None:
    own = known_format(module).quantizer(module)
    if own is not None and own != replacement.quantizer:
        raise ValueError(
            f"the base of {target.name!r} is quantized as {own.name}, but the "
            f"adapter was trained on {replacement.quantizer.name}. Load the model with the "
            "quantization_config of the training."
        )


def _compare_base(
    weights: BaseWeights,
    plan: Plan,
    fingerprints: Mapping[str, str],
    quantizers: Mapping[str, Any],
    contents: Contents,
    known: Collection[str],
) -> None:
    for target in plan.targets:
        expected = fingerprints.get(contents.names(target.name))
        if expected is None or target.name in known:
            continue
        if has_fingerprint(weights.present(target), expected):
            continue
        message = (
            f"the base weight of {target.name!r} is not the one the adapter was trained on. Load "
            "the original base model."
        )
        if quantizers:
            raise ValueError(message + " The quantized base is computed from these weights.")
        warnings.warn(message, stacklevel=5)
        return
