"""Which fused parameters of experts a configuration selects, by new names and by old ones."""

import pytest
from mixtures import mixture

from lora_init import LoraConfig, get_peft_model

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def ranks(kind, **settings):
    """The ranks of the fused parameters of the last layer."""
    plan = get_peft_model(mixture(kind), LoraConfig(**({"r": 2} | settings)), dry_run=True)
    prefix = "model.layers.1."
    return {
        target.name.removeprefix(prefix): target.rank
        for target in plan.targets
        if target.experts is not None and target.name.startswith(prefix)
    }


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("mixtral", {"target_modules": "all-linear"}, {GATE_UP: 4, DOWN: 2}),
        ("mixtral", {"target_modules": "all-linear", "experts": False}, {}),
        ("mixtral", {"target_modules": ["w1", "w2", "w3"]}, {GATE_UP: 4, DOWN: 2}),
        ("mixtral", {"target_modules": ["w2", "q_proj"]}, {DOWN: 2}),
        ("mixtral", {"target_modules": ["q_proj"]}, {}),
        ("mixtral", {"target_modules": "all-linear", "exclude_modules": ["experts"]}, {}),
        ("qwen3_moe", {"target_modules": ["gate_proj", "o_proj"]}, {}),
        ("qwen3_moe", {"target_modules": r".*(gate|up)_proj"}, {GATE_UP: 4}),
        ("qwen3_moe", {"target_modules": ["up_proj", "gate_proj"], "layers_to_transform": [0]}, {}),
        ("qwen2_moe", {"target_modules": "all-linear"}, {}),
        ("qwen2_moe", {"target_modules": "all-linear", "experts": True}, {GATE_UP: 4, DOWN: 2}),
        ("qwen2_moe", {"target_modules": ["down_proj"]}, {}),
        ("qwen2_moe", {"target_parameters": ["experts.gate_up_proj"]}, {GATE_UP: 2}),
        ("qwen2_moe", {"target_parameters": r".*1\.mlp\.experts\.\w+"}, {GATE_UP: 2, DOWN: 2}),
        ("mixtral", {"target_modules": "all-linear", "rank_pattern": {"gate_up_proj": 3}},
         {GATE_UP: 3, DOWN: 2}),
        ("mixtral", {"target_modules": "all-linear", "use_dora": True}, {}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_the_selection_of_experts(kind, settings, expected):
    assert ranks(kind, **settings) == expected


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("qwen3_moe", {"target_modules": ["experts.3.up_proj"]},
         r"'experts.3.up_proj' is the module of one expert.*target_parameters=\['experts.gate_up"),
        ("granitemoehybrid", {"target_modules": ["block_sparse_moe.input_linear"]},
         r"'block_sparse_moe.input_linear' is the module of experts in an older checkpoint.*"
         r"target_parameters=\['experts.gate_up_proj'\]"),
        ("qwen3_moe", {"target_modules": ["gate_proj"], "experts": True},
         r"experts=True is not supported: must select both modules that '.*gate_up_proj' replaced"),
        ("gpt_oss", {"target_parameters": ["experts.down_proj_bias"]},
         r"'experts.down_proj_bias' matches .* of shape 4×32 in a GptOssExperts, which is not"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_adapted_are_refused_with_the_fix(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        ranks(kind, **settings)


def test_the_weight_of_a_linear_module_is_a_parameter_too():
    config = LoraConfig(r=2, target_parameters=["self_attn.q_proj.weight"])
    plan = get_peft_model(mixture("mixtral"), config, dry_run=True)
    assert [target.name for target in plan.targets] == [
        f"model.layers.{number}.self_attn.q_proj" for number in range(2)
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "settings", "routers"),
    [
        ("mixtral", {"target_modules": "all-linear"}, 2),
        ("mixtral", {"target_modules": "all-linear", "experts": False}, 0),
        ("mixtral", {"target_modules": "all-linear", "lora_dropout": 0.1}, 0),
        ("mixtral", {"target_modules": ["gate", "w2"]}, 2),
        ("gpt_oss", {"target_modules": "all-linear"}, 0),
        ("gpt_oss", {"target_modules": "all-linear", "experts": True}, 2),
        ("gpt_oss", {"target_parameters": ["0.mlp.router.weight"]}, 1),
        ("llama4_text", {"target_modules": "all-linear", "experts": True}, 2),
    ],
)
def test_the_selection_of_routers(kind, settings, routers):
    plan = get_peft_model(mixture(kind), LoraConfig(r=2, **settings), dry_run=True)
    assert sum(target.module_type == "Router" for target in plan.targets) == routers


def test_a_name_without_a_parameter_is_warned_about():
    config = LoraConfig(target_parameters=["experts.down_proj", "experts.w2"])
    with pytest.warns(UserWarning, match="target_parameters: 'experts.w2' matches none"):
        get_peft_model(mixture("mixtral"), config)


@pytest.mark.wrong_types
def test_the_keyword_is_checked_and_not_saved():
    with pytest.raises(ValueError, match="experts='yes' is not supported: must be True, False or"):
        LoraConfig(experts="yes")
    assert "experts" not in LoraConfig(experts=True).to_dict()
