"""The targets of a saved adapter that PEFT reads as other modules, compared with PEFT itself."""

import warnings

import peft
import pytest
from mixtures import mixture
from models import llama
from peft.utils import transformers_weight_conversion as conversion
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from lora_init import LoraConfig, get_peft_model
from lora_init.adapters.peft_selection import different_in_peft
from lora_init.plan.expert_names import EXPERT_NAMES

CASES = [
    ("deepseek_v3", "all-linear"),
    ("deepseek_v3", ["down_proj"]),
    ("deepseek_v3", ["q_a_proj", "o_proj"]),
    ("deepseek_v3", ["gate_proj", "up_proj"]),
    ("deepseek_v3", ["gate_proj", "o_proj"]),
    ("deepseek_v3", ["mlp.down_proj", "o_proj"]),
    ("deepseek_v3", r".*layers\.0\.(mlp\.down_proj|self_attn\.o_proj)"),
    ("glm4_moe", ["down_proj", "q_proj"]),
    ("qwen3_moe", ["q_proj", "down_proj"]),
    ("qwen3_moe", ["q_proj", "v_proj"]),
    ("mixtral", ["q_proj", "v_proj"]),
    ("qwen2_moe", ["down_proj", "q_proj"]),
    ("olmoe", "all-linear"),
    ("llama", ["down_proj", "q_proj"]),
]


def build(kind):
    return llama() if kind == "llama" else mixture(kind)


def pefts_modules(kind, folder):
    """The modules that PEFT adapts when it reads the folder; None if it refuses."""
    try:
        model = peft.get_peft_model(build(kind), peft.LoraConfig.from_pretrained(folder))
    except ValueError:
        return None
    prefix, suffix = "base_model.model.", ".lora_A"
    names = [name for name, _ in model.named_modules() if name.endswith(suffix)]
    return {name[len(prefix) : -len(suffix)] for name in names}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "targets"), CASES)
def test_the_differences_are_those_of_peft(kind, targets, tmp_path):
    config = LoraConfig(r=2, target_modules=targets)
    plan = get_peft_model(build(kind), config, dry_run=True)
    plan.explicit(config).save_pretrained(tmp_path)
    ours = {target.name for target in plan.targets}
    theirs = pefts_modules(kind, tmp_path)
    found = {difference.name for difference in different_in_peft(build(kind), plan)}
    if theirs is None:
        assert found == ours
    else:  # PEFT's wrapped experts are modules too, but our plans do not name them
        assert found == {name for name in ours ^ theirs if not name.endswith((".experts", ".gate"))
                         and ".experts." not in name}  # fmt: skip


def test_the_table_of_model_types_is_pefts():
    table = conversion._MODEL_TO_CONVERSION_PATTERN
    theirs = {
        kind: conversion._MOE_TARGET_MODULE_MAPPING[pattern]
        for kind, pattern in table.items()
        if pattern in conversion._MOE_FUSED_TARGETS
        and get_checkpoint_conversion_mapping(kind) is not None
    }
    assert theirs == EXPERT_NAMES


@pytest.mark.parametrize("dry_run", [True, False])
def test_the_differences_are_warned_about(dry_run):
    config = LoraConfig(r=2, target_modules=["down_proj", "o_proj"], lora_dropout=0.1)
    with pytest.warns(UserWarning, match=r"PEFT would load .*layers\.0\.mlp\.down_proj, .*experts"):
        get_peft_model(mixture("deepseek_v3"), config, dry_run=dry_run)


def test_a_selection_that_peft_reads_alike_is_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for kind, targets in (("mixtral", ["q_proj"]), ("llama", ["down_proj"])):
            get_peft_model(build(kind), LoraConfig(target_modules=targets), dry_run=True)


def test_keys_that_peft_renames_are_warned_about(tmp_path):
    """transformers' renaming of Laguna's `mlp.shared_expert.` also matches `mlp.shared_experts`."""
    transformers = pytest.importorskip("transformers", minversion="5.23")
    config = transformers.LagunaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=8,
    )  # fmt: skip
    settings = LoraConfig(r=2, target_modules=["shared_experts.down_proj", "o_proj"])
    with pytest.warns(UserWarning, match=r"layers\.1\.mlp\.shared_experts.down_proj.* renames"):
        model = get_peft_model(transformers.LagunaForCausalLM(config), settings)
    warned = {one.name for one in different_in_peft(model.unload(), model.plan)}
    model = get_peft_model(transformers.LagunaForCausalLM(config), settings)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="missing adapter keys") as said:
        peft.PeftModel.from_pretrained(transformers.LagunaForCausalLM(config), tmp_path)
    missing = next(str(w.message) for w in said if "missing adapter keys" in str(w.message))
    assert all((name in missing) == (name in warned) for name in model.layers)
