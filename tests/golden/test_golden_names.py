"""The names that users could write at commit 1d1a888 still exist."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import golden_networks as golden
import pytest

import lora_init
from lora_init import LoraConfig, LoraModel, get_peft_model, list_initializers

NAMES = golden.read_json("names")
REMOVED = {  # see CHANGELOG.md: the contract of a method is new, and sketches are gone
    "Initializer": {
        "adjust_alpha", "allocate", "calibration", "function_for", "leading", "narrow", "nesting",
        "rank_rule", "spellings", "stacks", "variants", "workspace",
    },
    "Plan": {"calibration_sketch"},
    "Calibration": {"errors"},
    "calibrate": {"sketch"},
    "get_peft_model": {"calibration_sketch"},
    "register_initializer": {"properties"},
}  # fmt: skip


def test_public_names():
    assert set(NAMES["lora_init"]) <= set(lora_init.__all__)
    assert all(hasattr(lora_init, name) for name in NAMES["lora_init"])


def test_methods():
    assert set(NAMES["methods"]) <= {spec.name for spec in list_initializers()}


def described(name: str) -> Any:
    config = LoraConfig(target_modules=["tall"])
    if name in ("Plan", "Target"):
        plan = get_peft_model(golden.network("dense"), config, dry_run=True)
        return plan if name == "Plan" else plan.targets[0]
    return list_initializers("pissa")[0] if name == "Initializer" else getattr(lora_init, name)


@pytest.mark.parametrize("name", [n for n in NAMES if n[0].isupper()])
def test_attributes(name):
    thing = described(name)
    found = set(dir(thing))
    if dataclasses.is_dataclass(thing):
        found |= {field.name for field in dataclasses.fields(thing)}
    assert set(NAMES[name]) - REMOVED.get(name, set()) <= found


@pytest.mark.parametrize("function", NAMES["parameters"])
def test_keyword_arguments(function):
    signature = inspect.signature(getattr(lora_init, function)).parameters
    assert set(NAMES["parameters"][function]) - REMOVED.get(function, set()) <= set(signature)


def test_a_model_has_its_methods_on_an_instance():
    model = get_peft_model(golden.network("dense"), LoraConfig(target_modules=["tall"]))
    assert isinstance(model, LoraModel)
    assert all(hasattr(model, name) for name in NAMES["LoraModel"])
