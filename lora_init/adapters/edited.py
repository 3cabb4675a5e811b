"""Apply edits that a user made in `adapter_config.json` after the adapter was saved.

Changes of the scaling and the dropout are applied, as in PEFT. Other changes contradict the tensors
or the header, and raise an error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lora_init.adapters.tensors import Contents
from lora_init.config.lora_config import LoraConfig
from lora_init.plan.match import PatternValues, name_matches, select
from lora_init.plan.plan import Plan
from lora_init.plan.tables import listed

KEPT_STARTS = (True, False, "gaussian", "eva", "orthogonal", "loftq", "mica")
"""Values of init_lora_weights for which PEFT does not change the base weights."""

FIXED = ("use_dora", "lora_bias", "bias")
SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout")
SELECTION = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
)


def followed(
    contents: Contents,
    config: LoraConfig,
    plan: Plan,
    values: Mapping[str, Any],
    doubled: int,
    *,
    fixed: bool,
) -> LoraConfig:
    """Return the training configuration with the edits of the file.

    Without edits, the result is `config` itself.

    Args:
        contents: the tensors of the file.
        config: the configuration of the training, from the header.
        plan: the plan of the adapter.
        values: the content of adapter_config.json.
        doubled: the rank in the file divided by the rank of the layer, 1 or 2.
        fixed: whether the scaling must not change, because the base was replaced.

    Raises:
        ValueError: an edit contradicts the adapter. The message names the field.
    """
    read = (*FIXED, *SCALING, *SELECTION)
    chosen = {name: values[name] for name in read if name in values} | {"peft_type": "LORA"}
    theirs = LoraConfig.from_dict(chosen)
    for name in FIXED:
        if getattr(theirs, name) != getattr(config, name):
            raise _contradiction(name, getattr(theirs, name), getattr(config, name))
    if not fixed and values.get("init_lora_weights", True) not in KEPT_STARTS:
        raise _contradiction("init_lora_weights", values["init_lora_weights"], True)
    if all(name == contents.names(name) for name in contents.layers):
        _check_selection(contents, theirs, plan)
    _check_modules_to_save(values, plan)
    moved = False
    ranks = PatternValues("rank_pattern", theirs.rank_pattern, theirs.r)
    alphas = PatternValues("alpha_pattern", theirs.alpha_pattern, theirs.lora_alpha)
    for target in plan.targets:
        name = contents.names(target.selected)
        rank, alpha = ranks(name), alphas(name)
        if rank != doubled * target.rank:
            raise _contradiction("r (or rank_pattern)", rank, doubled * target.rank)
        moved |= not math.isclose(theirs.scaling(rank, alpha), target.scaling, rel_tol=1e-9)
    if moved and fixed:
        raise ValueError(
            "lora_alpha, use_rslora or alpha_pattern in adapter_config.json was edited, but the "
            "base of this adapter depends on the original scaling. Restore the original values."
        )
    if theirs.lora_dropout != config.lora_dropout:
        config = dataclasses.replace(config, lora_dropout=theirs.lora_dropout)
    if not moved:
        return config
    factor = 1.0 if doubled == 1 else math.sqrt(2) if theirs.use_rslora else 2.0
    return dataclasses.replace(
        config,
        use_rslora=theirs.use_rslora,
        lora_alpha=theirs.lora_alpha / factor,
        alpha_pattern={key: alpha / factor for key, alpha in (theirs.alpha_pattern or {}).items()},
    )


def _check_selection(contents: Contents, theirs: LoraConfig, plan: Plan) -> None:
    if theirs.target_modules is None and theirs.target_parameters is None:
        return
    theirs = dataclasses.replace(theirs, experts=False)
    failure = None
    try:
        found = select(contents.base, theirs, plan.modules_to_save)
        chosen = (*found.names, *found.experts)
    except ValueError as error:
        chosen, failure = (), error
    wanted = [target.name for target in plan.targets]
    if set(chosen) != set(wanted):
        differing = sorted(set(chosen) ^ set(wanted))
        raise ValueError(
            f"target_modules={theirs.target_modules!r} (with {', '.join(SELECTION[1:])}) in "
            f"adapter_config.json contradicts the adapter: its layers differ in "
            f"{listed(differing)}. Restore the original value."
        ) from failure


def _check_modules_to_save(values: Mapping[str, Any], plan: Plan) -> None:
    entries = values.get("modules_to_save") or []
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"modules_to_save={entries!r} is not supported: must be a list of names.")
    for name in plan.candidates:
        if any(name_matches(name, entry) for entry in entries):
            raise ValueError(
                f"modules_to_save={entries!r} in adapter_config.json contradicts the adapter, "
                f"which has no tensors for {name!r}. Restore the original value."
            )


def _contradiction(name: str, found: Any, wanted: Any) -> ValueError:
    return ValueError(
        f"{name}={found!r} in adapter_config.json contradicts the adapter, which was saved with "
        f"{wanted!r}. Restore this value."
    )
