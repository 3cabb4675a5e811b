"""Names that experts have in older checkpoints, and the fused parameters that replaced them.

transformers 5 stores the weights of all experts in one tensor. `target_modules` may still name the
linear modules that older versions had, such as "w1" or "gate_proj".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from torch import nn

from lora_init.weights.experts import FORMER
from lora_init.weights.single_experts import former_names

_QWEN2_MOE = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
              "down_proj": "down_proj"}  # fmt: skip
_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_MODEL_TYPES = {
    "Dots3NoteTextModel UnlimitedOcrTextModel afmoe beam cohere2_moe deepseek_v2 deepseek_v3 "
    "deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm4v_moe "
    "glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next qwen3_omni_moe "
    "qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open": _QWEN2_MOE,
    "minimax minimax_m2 mixtral": _MIXTRAL,
}
EXPERT_NAMES = {kind: names for kinds, names in _MODEL_TYPES.items() for kind in kinds.split()}
"""By model type: old names of expert layers, and the parameters to which PEFT maps them."""

ONE_EXPERT = re.compile(r"(^|\.)\w*experts\.\d+\.(?P<name>\w+)$")


def pefts_names(model: nn.Module) -> dict[str, str]:
    """The old names that PEFT maps to parameters of this model; empty for most models."""
    return EXPERT_NAMES.get(getattr(getattr(model, "config", None), "model_type", ""), {})


def meant(name: str, matches: Callable[[str], bool]) -> Literal["all", "some", "none"]:
    """How many of the modules that a fused parameter replaced are selected.

    Args:
        name: the name of the parameter.
        matches: whether the name of a module is selected.
    """
    owner, _, matrix = name.rpartition(".")
    found = [[matches(f"{owner}.{old}") for old in family] for family in FORMER[matrix]]
    if any(all(family) for family in found):
        return "all"
    return "some" if any(any(family) for family in found) else "none"


def refuse_former_name(entry: str, parameters: list[str]) -> None:
    """Raise if an entry of target_modules names experts as an older checkpoint does.

    Args:
        parameters: the names of the model's fused parameters.

    Raises:
        ValueError: the message has the new name.
    """
    found = ONE_EXPERT.search(entry)
    for name in parameters:
        families = FORMER[name.rpartition(".")[2]]
        is_one = found is not None and any(found["name"] in family for family in families)
        if is_one or any(f".{former}".endswith(f".{entry}") for former in former_names(name)):
            short = ".".join(name.split(".")[-2:])
            kind = "one expert" if is_one else "experts"
            raise ValueError(
                f"target_modules: {entry!r} is the module of {kind} in an older checkpoint. "
                f"All experts share the parameter {name!r} now: set target_parameters=[{short!r}]."
            )
