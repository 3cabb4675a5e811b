"""LoraConfig: the reference's fields and defaults, PEFT's file, and errors that name a field."""

import dataclasses
import json

import peft
import pytest

from lora_init import LoraConfig
from lora_init.initializers.corda import CordaOptions
from lora_init.initializers.pissa import PissaOptions

REFERENCE = {
    "r": 8,
    "target_modules": None,
    "exclude_modules": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "use_dora": False,
    "lora_bias": False,
}


def test_fields_and_defaults_are_those_of_the_reference():
    config = LoraConfig()
    for name, default in REFERENCE.items():
        assert getattr(config, name) == default
    assert not config.rank_pattern
    assert not config.alpha_pattern


def test_defaults_agree_with_peft():
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    ours = {field.name for field in dataclasses.fields(LoraConfig)} - {"experts"}
    assert ours <= theirs
    for name in ours - {"task_type"}:
        assert getattr(LoraConfig(), name) == getattr(peft.LoraConfig(), name), name


def test_the_file_has_pefts_keys_and_loads_unchanged(tmp_path):
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        init_lora_weights="corda",
        corda_config={"corda_method": "kpm"},
        rank_pattern={"q_proj": 4},
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    values = json.loads(text)
    assert list(values) == sorted(values)
    peft.LoraConfig(target_modules=["q"]).save_pretrained(tmp_path / "peft")
    assert set(values) == set(json.loads((tmp_path / "peft" / "adapter_config.json").read_text()))
    loaded = LoraConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.initializer()[1] == CordaOptions(corda_method="kpm")


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": True},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.5)},
        {"use_rslora": True, "alpha_pattern": {"q": 3}, "layers_to_transform": [0], "r": 4},
    ],
)
def test_a_config_written_by_peft_means_the_same_here(tmp_path, settings):
    peft.LoraConfig(target_modules=["q"], **settings).save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    for name, value in settings.items():
        if name != "eva_config":
            assert getattr(config, name) == value
    config.save_pretrained(tmp_path / "again")
    theirs = peft.LoraConfig.from_pretrained(tmp_path / "again")
    assert theirs.init_lora_weights == settings.get("init_lora_weights", True)


def test_every_form_of_the_initializer_means_the_same():
    expected = PissaOptions(niter=4)
    forms = ["pissa_niter_4", {"name": "pissa", "niter": 4}, PissaOptions(niter=4)]
    for form in forms:
        spec, options = LoraConfig(init_lora_weights=form).initializer()
        assert (spec.name, options) == ("pissa", expected)
    assert LoraConfig(init_lora_weights=True).initializer()[0].name == "kaiming"
    assert LoraConfig(init_lora_weights=False).initializer()[0].name == "random"


def test_options_without_a_peft_field_survive_the_file(tmp_path):
    config = LoraConfig(init_lora_weights=PissaOptions(method="exact"))
    config.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).initializer()[1] == PissaOptions(method="exact")


def refused(match, error=ValueError, **settings):
    with pytest.raises(error, match=match):
        LoraConfig(**settings)


def test_unknown_initializer_names_the_nearest():
    refused(r"'pisa' is not a registered.*did you mean 'pissa'", init_lora_weights="pisa")
    refused(r"niter_x", init_lora_weights="pissa_niter_x")
    refused("must be a bool", TypeError, init_lora_weights=3)


@pytest.mark.wrong_types
@pytest.mark.parametrize("rank", [0, -1, 2.5, "8", True])
def test_ranks_are_positive_integers(rank):
    refused(r"r=.*integer >= 1", r=rank)
    refused(r"rank_pattern\['q'\]=.*integer >= 1", rank_pattern={"q": rank})


@pytest.mark.wrong_types
@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), "8"])
def test_alphas_are_positive_and_finite(alpha):
    refused("lora_alpha=.*positive finite", lora_alpha=alpha)
    refused(r"alpha_pattern\['q'\]=", alpha_pattern={"q": alpha})


@pytest.mark.wrong_types
@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan"), "0.1"])
def test_dropout_is_a_probability_below_one(dropout):
    refused(r"lora_dropout=.*at least 0\.0 and less than 1\.0", lora_dropout=dropout)


def test_layer_indices_need_a_list_of_names():
    refused("layers_to_transform.*Pass a list", layers_to_transform=[0], target_modules=".*q")
    refused("layers_to_transform.*Pass a list", layers_to_transform=0, target_modules="all-linear")
    refused("layers_pattern.*layers_to_transform", layers_pattern="layers", target_modules=["q"])


@pytest.mark.wrong_types
def test_values_of_a_wrong_type_are_named():
    refused("modules_to_save='lm_head' is not supported: must be a list", modules_to_save="lm_head")
    refused("rank_pattern='q' is not supported: must be a mapping", rank_pattern="q")
    refused("rho='2'", init_lora_weights={"name": "eva", "rho": "2"})
    refused("rho=inf", init_lora_weights={"name": "eva", "rho": float("inf")})
    refused("damping='x'", init_lora_weights={"name": "corda", "damping": "x"})
    refused("loftq_iter=True", init_lora_weights={"name": "loftq", "loftq_iter": True})


@pytest.mark.wrong_types
def test_variants_are_checked():
    for setting in ("use_dora", "lora_bias", "use_rslora"):
        for value in (1, "true", None):
            message = f"{setting}={value!r} is not supported: must be True or False"
            refused(message, **{setting: value})
    refused(
        "lora_bias=True with use_dora=True.*Set one of them to False", use_dora=True, lora_bias=True
    )
    for bias in ("some", None, True):
        message = f"bias={bias!r} is not supported: must be one of 'none', 'all', 'lora_only'"
        refused(message, bias=bias)
    for bias in ("none", "all", "lora_only"):
        assert LoraConfig(bias=bias).to_dict()["bias"] == bias


def test_options_of_another_method_are_refused():
    refused("eva_config is not supported with init_lora_weights='pissa'", **{
        "init_lora_weights": "pissa", "eva_config": {"rho": 1.0},
    })  # fmt: skip
    refused("unknown option 'rhoo'; did you mean 'rho'", **{
        "init_lora_weights": "eva", "eva_config": {"rhoo": 1.0},
    })  # fmt: skip
    refused("corda_method='x'", init_lora_weights="corda", corda_config={"corda_method": "x"})
    refused("loftq_bits=3", init_lora_weights="loftq", loftq_config={"loftq_bits": 3})
    refused("rho=0.5", init_lora_weights={"name": "eva", "rho": 0.5})
    refused("tau=0.5", init_lora_weights="eva", eva_config={"tau": 0.5})
    refused("task_type='NOPE'", task_type="NOPE")


def test_fields_of_peft_that_are_not_supported(tmp_path):
    values = LoraConfig().to_dict()
    assert LoraConfig.from_dict(values).to_dict() == values
    for name, value in {"use_qalora": True, "layer_replication": [[0, 1]]}.items():
        with pytest.raises(ValueError, match=f"{name}=.*it is a setting of PEFT"):
            LoraConfig.from_dict(values | {name: value})
    with pytest.warns(UserWarning, match="'lora_alfa' \\(did you mean 'lora_alpha'"):
        assert LoraConfig.from_dict(values | {"lora_alfa": 3}).lora_alpha == 8
    with pytest.raises(ValueError, match="peft_type='LOHA'"):
        LoraConfig.from_dict(values | {"peft_type": "LOHA"})
    corda = {"corda_method": "kpm", "cache_file": None, "verbose": False}
    config = LoraConfig.from_dict(
        values | {"init_lora_weights": "corda", "corda_config": dict(corda)}
    )
    assert config.initializer()[1].corda_method == "kpm"
    with pytest.raises(ValueError, match=r"corda_config.cache_file is a setting of PEFT"):
        LoraConfig(init_lora_weights="corda", corda_config=corda | {"cache_file": "x"})
