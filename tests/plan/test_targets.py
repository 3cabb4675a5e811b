"""Which modules are adapted: PEFT's rules, and mistakes that its users report."""

import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model as peft_get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lora_init import LoraConfig, get_peft_model
from lora_init.plan.match import pattern_value, select

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 11}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24, num_key_value_heads=1))


def bert():
    return BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=24))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.seq_query = nn.Linear(4, 4), nn.Linear(4, 4)


class RootList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head, self.lm_head = nn.Linear(4, 2), nn.Linear(4, 3)


CASES = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": r".*\.[12]\..*(gate|up)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": None},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.mlp.up_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.2\..*"},
    {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [2]},
]


def pefts_choice(model, settings):
    wrapped = peft_get_peft_model(model, PeftLoraConfig(r=2, **settings))
    prefix = "base_model.model."
    return [
        name[len(prefix) : -len(".lora_A")]
        for name, _ in wrapped.named_modules()
        if name.endswith(".lora_A")
    ]


@pytest.mark.parametrize("settings", CASES)
def test_the_same_modules_as_peft(settings):
    ours = list(select(llama(), LoraConfig(r=2, **settings)).names)
    assert ours == pefts_choice(llama(), settings)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_all_linear_leaves_out_a_classifier_as_peft_does(task_type):
    settings = {"target_modules": "all-linear", "task_type": task_type}
    ours = list(select(bert(), LoraConfig(r=2, **settings)).names)
    theirs = [n for n in pefts_choice(bert(), settings) if not n.startswith("classifier")]
    assert ours == theirs
    assert "classifier" not in ours
    assert "bert.pooler.dense" in ours


def test_all_linear_takes_conv1d():
    settings = {"target_modules": "all-linear"}
    assert list(select(gpt2(), LoraConfig(r=2, **settings)).names) == pefts_choice(gpt2(), settings)


def test_names_match_whole_parts_only():
    names = select(RootList(), LoraConfig(target_modules=["query"])).names
    assert names == tuple(f"layers.{i}.query" for i in range(3))
    for entry in ("proj", "q", "_proj", "elf_attn.q_proj"):
        with pytest.raises(ValueError, match=f"target_modules=\\['{entry}'\\] matches no module"):
            get_peft_model(llama(), LoraConfig(target_modules=[entry]))


def test_a_layer_list_at_the_root_is_found():
    config = LoraConfig(target_modules=["query"], layers_to_transform=[1])
    assert select(RootList(), config).names == ("layers.1.query",)
    config = LoraConfig(
        target_modules=["query"], layers_to_transform=[1], layers_pattern=["blocks", "layers"]
    )
    assert select(RootList(), config).names == ("layers.1.query",)


def test_modules_to_save_match_whole_parts_and_are_not_adapted():
    config = LoraConfig(target_modules=["query", "head"], modules_to_save=["head"])
    selection = select(RootList(), config)
    assert selection.modules_to_save == ("head",)
    assert "head" not in selection.names
    with pytest.raises(ValueError, match="modules_to_save: no module is called 'heads'.*'head'"):
        select(RootList(), LoraConfig(target_modules=["query"], modules_to_save=["heads"]))


def test_a_sequence_classifier_saves_its_new_head():
    selection = select(bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert selection.modules_to_save == ("classifier",)


def test_patterns_take_the_first_key_that_matches():
    patterns = {r".*\.0\..*": 2, "q_proj": 3, "^q_proj": 4}
    assert pattern_value("rank_pattern", patterns, "layers.0.q_proj", 8) == 2
    assert pattern_value("rank_pattern", patterns, "layers.1.q_proj", 8) == 3
    assert pattern_value("rank_pattern", patterns, "layers.1.seq_proj", 8) == 8
    assert pattern_value("rank_pattern", {"^q_proj": 4}, "layers.1.q_proj", 8) == 8


def test_what_matches_nothing_is_reported_and_refused():
    model = llama()
    config = LoraConfig(
        target_modules=["q_proj", "query"],
        exclude_modules=["nothing"],
        rank_pattern={"v_proj": 4},
        alpha_pattern={"up_proj": 4},
    )
    plan = get_peft_model(model, config, dry_run=True)
    assert set(plan.unmatched) == {
        ("target_modules", "query"),
        ("exclude_modules", "nothing"),
        ("rank_pattern", "v_proj"),
        ("alpha_pattern", "up_proj"),
    }
    assert "rank_pattern 'v_proj'" in str(plan)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with (
        pytest.warns(UserWarning, match="target_modules: 'query' matches none"),
        pytest.raises(ValueError, match="rank_pattern: 'v_proj' matches none of the 3 targets"),
    ):
        get_peft_model(model, config)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_unmatched_keys_are_allowed_on_request(setting):
    """One configuration for several models: each entry applies where it matches."""
    pattern = {"query": 2, r"layers\.1\..*": 2}
    config = LoraConfig(r=4, target_modules=["q_proj"], **{setting: pattern})
    with pytest.raises(ValueError, match=f"{setting}: 'query'.*or pass allow_unmatched=True"):
        get_peft_model(llama(), config)
    with pytest.warns(UserWarning, match=f"{setting}: 'query' matches none of the 3 targets"):
        model = get_peft_model(llama(), config, allow_unmatched=True)
    chosen = "rank" if setting == "rank_pattern" else "alpha"
    values = [getattr(target, chosen) for target in model.plan.targets]
    other = 4 if chosen == "rank" else 8
    assert values == [other, 2, other]


# A regular expression would make Hypothesis tabulate Unicode first, for seconds.
PARTS = [a + b for a in "abc" for b in ("", *"abc")]
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map(".".join)


@given(names=st.lists(NAMES, unique=True, min_size=1), keys=st.lists(NAMES, unique=True))
def test_a_pattern_is_the_first_dotted_suffix(names, keys):
    """Compare with the rule, on random names: a key never matches a part of a name's component."""
    patterns = {re.escape(key): value for value, key in enumerate(keys, 1)}
    for name in names:
        parts = name.split(".")
        suffixes = {".".join(parts[i:]) for i in range(len(parts))}
        expected = next((v for v, key in enumerate(keys, 1) if key in suffixes), 0)
        assert pattern_value("rank_pattern", patterns, name, 0) == expected


class Tree(nn.Module):
    """Linear modules with the given dotted names, except names that collide."""

    def __init__(self, names):
        super().__init__()
        self.names = []
        for name in names:
            *parents, last = name.split(".")
            node, free = self, True
            for part in parents:
                if part not in node._modules:
                    node.add_module(part, nn.Module())
                node = node._modules[part]
                free = free and not isinstance(node, nn.Linear)
            if free and last not in node._modules:
                node.add_module(last, nn.Linear(6, 5))
                self.names.append(name)


@given(
    names=st.lists(NAMES, unique=True, min_size=1, max_size=6),
    ranks=st.dictionaries(NAMES, st.integers(1, 5), max_size=3),
    alphas=st.dictionaries(NAMES, st.sampled_from([0.5, 3.0]), max_size=3),
    use_rslora=st.booleans(),
    data=st.data(),
)
def test_plans_of_any_model_follow_the_rules(names, ranks, alphas, use_rslora, data):
    model = Tree(names)
    targets = data.draw(st.lists(st.sampled_from(model.names), unique=True, min_size=1))
    targets = [".".join(name.split(".")[data.draw(st.integers(0, 2)) :]) for name in targets]
    targets = [target for target in targets if target] or [model.names[0]]
    meant = [
        (name, module) for name, module in model.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    ]  # fmt: skip
    assume(all(isinstance(module, nn.Linear) for _, module in meant))  # no name is a container
    expected = [name for name, _ in meant]
    config = LoraConfig(
        r=2, lora_alpha=7, target_modules=targets, use_rslora=use_rslora,
        rank_pattern={re.escape(key): rank for key, rank in ranks.items()},
        alpha_pattern={re.escape(key): alpha for key, alpha in alphas.items()},
    )  # fmt: skip
    plan = get_peft_model(model, config, dry_run=True)
    assert [target.name for target in plan.targets] == expected
    for target in plan.targets:
        parts = target.name.split(".")
        suffixes = {".".join(parts[i:]) for i in range(len(parts))}
        rank = next((ranks[key] for key in ranks if key in suffixes), 2)
        alpha = next((alphas[key] for key in alphas if key in suffixes), 7)
        assert (target.rank, target.alpha) == (rank, alpha)
        assert target.scaling == pytest.approx(alpha / (rank**0.5 if use_rslora else rank))
    used = {e for setting, e in plan.unmatched if setting in ("rank_pattern", "alpha_pattern")}
    matching = {
        key for key in {*ranks, *alphas}
        if any(name == key or name.endswith(f".{key}") for name in expected)
    }  # fmt: skip
    assert used == {re.escape(key) for key in {*ranks, *alphas} - matching}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["query"]}, r"\['query'\] matches no module.*'q_proj'"),
        ({"target_modules": "q_proj"}, r"'q_proj' matches no module of LlamaForCausalLM"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, r"layers_to_transform=\[9\]"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leaves nothing"),
        ({"target_modules": "*q"}, "'\\*q' is not a regular expression"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"(": 2}}, "is not a regular expression"),
    ],
)
def test_no_target_is_an_error_with_names_that_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        select(llama(), LoraConfig(**settings))


def test_an_unknown_architecture_asks_for_names():
    with pytest.raises(ValueError, match="no defaults for model_type=None; name the modules"):
        select(RootList(), LoraConfig())
