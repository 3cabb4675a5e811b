"""LoraConfig takes values from other libraries, and stores plain JSON types."""

import dataclasses
import enum
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from models import llama, token_batches
from networks import Chain
from omegaconf import OmegaConf

import lora_init
from lora_init import LoraConfig, calibrate, get_peft_model
from lora_init.initializers.eva import EvaOptions

pytestmark = pytest.mark.wrong_types


class Task(enum.StrEnum):
    CLASSIFY = "SEQ_CLS"


VALUES = [
    ("target_modules", OmegaConf.create(["q", "v"]), ["q", "v"]),
    ("target_modules", ("q", "v"), ["q", "v"]),
    ("target_modules", {"v", "q"}, ["q", "v"]),
    ("target_modules", frozenset({"v", "q"}), ["q", "v"]),
    ("target_modules", {"q": 1, "v": 2}.keys(), ["q", "v"]),
    ("target_modules", np.array(["q", "v"]), ["q", "v"]),
    ("target_modules", np.str_("q|v"), "q|v"),
    ("target_modules", (name for name in "qv"), ["q", "v"]),
    ("target_modules", "All-Linear", "all-linear"),
    ("exclude_modules", OmegaConf.create(["q"]), ["q"]),
    ("exclude_modules", {"q"}, ["q"]),
    ("modules_to_save", ("head",), ["head"]),
    ("modules_to_save", OmegaConf.create(["head"]), ["head"]),
    ("layers_to_transform", range(2), [0, 1]),
    ("layers_to_transform", np.arange(2), [0, 1]),
    ("layers_to_transform", torch.arange(2), [0, 1]),
    ("layers_to_transform", np.int64(1), 1),
    ("layers_to_transform", [np.int32(1), torch.tensor(2)], [1, 2]),
    ("layers_to_transform", [], None),
    ("layers_pattern", [], None),
    ("r", np.int64(4), 4),
    ("r", torch.tensor(4), 4),
    ("lora_alpha", np.float32(0.5), 0.5),
    ("lora_alpha", torch.tensor(16), 16),
    ("lora_dropout", np.float64(0.25), 0.25),
    ("use_rslora", np.bool_(True), True),
    ("use_dora", torch.tensor(True), True),
    ("bias", np.str_("all"), "all"),
    ("rank_pattern", OmegaConf.create({"q": 4}), {"q": 4}),
    ("rank_pattern", {"q": np.int64(4)}, {"q": 4}),
    ("rank_pattern", None, {}),
    ("alpha_pattern", {np.str_("q"): torch.tensor(4)}, {"q": 4}),
    ("task_type", peft.TaskType.SEQ_CLS, "SEQ_CLS"),
    ("task_type", Task.CLASSIFY, "SEQ_CLS"),
    ("base_model_name_or_path", Path("a") / "b", "a/b"),
    ("init_lora_weights", "OLoRA", "olora"),
    ("init_lora_weights", "Gaussian", "gaussian"),
    ("init_lora_weights", "PiSSA", "pissa"),
    ("init_lora_weights", "PiSSA_Niter_4", "pissa_niter_4"),
    ("init_lora_weights", "LoRA-GA", "lora_ga"),
    ("init_lora_weights", np.bool_(False), False),
    ("init_lora_weights", OmegaConf.create({"name": "eva", "rho": 1}), {"name": "eva", "rho": 1}),
]


@pytest.mark.parametrize(("field", "given", "stored"), VALUES)
def test_a_field_is_stored_as_a_plain_json_type(field, given, stored, tmp_path):
    settings = {field: given}
    if field == "layers_pattern":
        settings["layers_to_transform"] = None
    config = LoraConfig(**settings)
    assert getattr(config, field) == stored
    assert type(getattr(config, field)) is type(stored)
    assert json.loads(json.dumps(dataclasses.asdict(config))) == dataclasses.asdict(config)
    config.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("given", [EvaOptions(rho=1.5), OmegaConf.create({"rho": 1.5}),
                                   peft.EvaConfig(rho=1.5)])  # fmt: skip
def test_method_options_are_stored_as_a_mapping(given):
    config = LoraConfig(init_lora_weights="EVA", eva_config=given)
    json.dumps(dataclasses.asdict(config))
    assert config.initializer()[1] == EvaOptions(rho=1.5)


def test_an_adapter_of_converted_values_is_saved_and_loaded(tmp_path):
    config = LoraConfig(
        r=np.int64(4),
        target_modules=OmegaConf.create(["q_proj", "v_proj"]),
        layers_to_transform=range(1),
        rank_pattern={"q_proj": np.int32(2)},
        alpha_pattern=OmegaConf.create({"v_proj": 4}),
    )
    model = get_peft_model(llama(), config)
    model.save_pretrained(tmp_path)
    again = lora_init.LoraModel.from_pretrained(llama(), tmp_path)
    assert [target.rank for target in again.plan.targets] == [2, 4]


def test_a_value_without_a_json_form_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(TypeError, match="target_modules=.*is not supported: must be"):
        LoraConfig(target_modules=object())
    with pytest.raises(TypeError, match="rank_pattern: the key 3 is not supported"):
        LoraConfig(rank_pattern={3: 4})
    config = LoraConfig(target_modules=["q"])
    config.target_modules = object()
    with pytest.raises(TypeError, match="target_modules="):
        config.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", 5), ("target_modules", [5]), ("target_modules", {"q": 1}),
        ("exclude_modules", 5), ("exclude_modules", [None]),
        ("modules_to_save", 5), ("modules_to_save", [5]),
        ("layers_to_transform", "0"), ("layers_to_transform", [0.5]), ("layers_to_transform", True),
        ("rank_pattern", ["q"]), ("alpha_pattern", 5), ("base_model_name_or_path", 5),
        ("fan_in_fan_out", "yes"), ("inference_mode", 1), ("r", [4]), ("r", torch.ones(2)),
    ],
)  # fmt: skip
def test_a_wrong_type_is_named(field, value):
    settings = {field: value}
    if field == "layers_pattern":
        settings["layers_to_transform"] = [0]
    with pytest.raises((TypeError, ValueError), match=rf"^{field}="):
        LoraConfig(**settings)


def pefts_defaults():
    ours = {field.name for field in dataclasses.fields(LoraConfig)}
    config = peft.LoraConfig()
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(peft.LoraConfig)
        if field.name not in ours
    }


def test_pefts_other_fields_are_accepted_at_their_defaults():
    assert LoraConfig(**pefts_defaults()).to_dict() == LoraConfig().to_dict()
    for settings in (
        {"target_parameters": []},
        {"trainable_token_indices": {}},
        {"use_qalora": False, "qalora_group_size": 32},
        {"megatron_core": "other"},
        {"peft_version": "0.1"},
        {"ensure_weight_tying": None},
    ):
        LoraConfig(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_replication", [[0, 4], [2, 5]]),
        ("trainable_token_indices", [1, 2]),
        ("megatron_config", {"a": 1}),
        ("use_qalora", True),
        ("ensure_weight_tying", True),
        ("runtime_config", peft.tuners.lora.LoraRuntimeConfig(ephemeral_gpu_offload=True)),
        ("peft_type", "LOHA"),
        ("lora_ga_config", {"stable_gamma": 2}),
    ],
)
def test_pefts_other_fields_are_refused_with_a_meaning(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is not supported: .*Leave it out"):
        LoraConfig(**{name: value})


def test_the_signature_has_the_fields_alone():
    import inspect

    names = [field.name for field in dataclasses.fields(LoraConfig)]
    assert list(inspect.signature(LoraConfig).parameters) == names
    with pytest.raises(TypeError, match="lora_alfa"):
        LoraConfig(lora_alfa=3)


EDITS = [
    ("r", -1, "r=-1"),
    ("lora_alpha", float("nan"), "lora_alpha=nan"),
    ("rank_pattern", {"square": 0}, "rank_pattern"),
    ("target_modules", 5, "target_modules=5"),
    ("init_lora_weights", "pisa", "did you mean 'pissa'"),
    ("bias", "some", "bias='some'"),
]


@pytest.mark.parametrize(("field", "value", "message"), EDITS)
def test_an_edited_configuration_is_checked_when_it_is_used(field, value, message, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva")
    setattr(config, field, value)
    model, batches = llama(), token_batches(1)
    for use in (
        lambda: get_peft_model(model, config, calibration=batches),
        lambda: get_peft_model(model, config, dry_run=True),
        lambda: calibrate(model, config, batches),
        lambda: calibrate(model, [config], batches),
        lambda: config.save_pretrained(tmp_path / "new"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            use()
    assert not (tmp_path / "new").exists()
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_an_edited_configuration_is_converted_when_it_is_used():
    config = LoraConfig(r=2)
    config.target_modules = OmegaConf.create(["square"])
    config.rank_pattern = {"square": np.int64(3)}
    model = get_peft_model(Chain(), config)
    assert model.plan.targets[0].rank == 3
    assert type(model.peft_config.target_modules) is list


def test_a_pattern_edited_in_place_is_checked():
    config = LoraConfig(r=2, target_modules=["square"])
    config.rank_pattern["square"] = 2.5
    with pytest.raises(ValueError, match=r"rank_pattern\['square'\]=2.5"):
        get_peft_model(Chain(), config)
