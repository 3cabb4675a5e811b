"""`adapter_config.json` of every PEFT version is read; unsupported settings are refused."""

import dataclasses
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from measures import assert_unchanged, snapshot
from models import llama
from safetensors.torch import save_file

from lora_init import LoraConfig, LoraModel, get_peft_model

FILES = sorted((Path(__file__).parent / "peft_configs").glob("*.json"))
VALUES = json.loads((Path(__file__).parent / "peft_configs" / "peft-0.6-llama2.json").read_text())


def write(folder, values):
    text = values if isinstance(values, str) else json.dumps(values)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_real_file_is_read_without_a_warning(path, tmp_path):
    values = json.loads(path.read_text())
    write(tmp_path, values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha) == (values["r"], values["lora_alpha"])
    assert config.target_modules == values["target_modules"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_empty_and_null_mean_unused(path, tmp_path):
    """Any field may be null, and any field of a later version may be empty."""
    values = json.loads(path.read_text())
    expected = LoraConfig.from_dict(values).to_dict()
    for name in values.keys() - {"peft_type", "r", "lora_alpha", "target_modules"}:
        if not values[name] or name in ("init_lora_weights", "bias"):
            continue
        default = LoraConfig().to_dict().get(name)
        changed = LoraConfig.from_dict(values | {name: None}).to_dict()
        assert changed == expected | {name: default if name in expected else None} or (
            name not in expected and changed == expected
        ), name
    later = {f"later_{i}": empty for i, empty in enumerate((None, False, 0, "", [], {}))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LoraConfig.from_dict(values | later).to_dict() == expected


UNUSED = {
    "enable_lora of 0.2": {"enable_lora": None, "merge_weights": True},
    "an empty layers_pattern": {"layers_pattern": []},
    "a layers_pattern without layers": {"layers_pattern": "layers", "layers_to_transform": None},
    "no layers": {"layers_to_transform": []},
    "target_parameters of a mixture of experts": {"target_parameters": []},
    "a group size without its switch": {"use_qalora": False, "qalora_group_size": 32},
    "Megatron's module without Megatron": {"megatron_core": "megatron.other"},
    "options of eva": {"eva_config": {"rho": 2.0, "tau": 0.99, "something": 1}},
    "options of corda": {"corda_config": {"corda_method": "kpm", "cache_file": "x"}},
    "options of loftq": {"loftq_config": {"loftq_bits": 3}},
    "options of lora_ga": {"lora_ga_config": {"direction": "ArB2r"}},
    "options of astra": {"astra_config": {"cache_file": "x", "verbose": True}},
    "tied weights without tied modules": {"ensure_weight_tying": True},
    "a runtime configuration": {"runtime_config": {"ephemeral_gpu_offload": True}},
    "unsloth's mapping": {"auto_mapping": {"unsloth_fixed": True, "parent_library": "x"}},
    "a rank as 8.0": {"r": 8.0, "rank_pattern": {"q_proj": 4.0}},
    "null in the place of a mapping": {"rank_pattern": None, "alpha_pattern": None},
    "false in the place of a list": {"modules_to_save": False, "exclude_modules": []},
}


@pytest.mark.parametrize("extra", UNUSED.values(), ids=UNUSED)
def test_unused_fields_are_ignored(extra):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = LoraConfig.from_dict(VALUES | extra)
    assert config.r == 8
    assert isinstance(config.r, int)
    assert config.to_dict()["init_lora_weights"] is True


def test_unknown_names_with_a_value_are_one_warning():
    extra = {"lora_alfa": 3, "sparsity": 0.5, "nothing": None}
    with pytest.warns(UserWarning, match="'lora_alfa' \\(did you mean.*'sparsity'") as caught:
        config = LoraConfig.from_dict(VALUES | extra)
    assert len(caught) == 1
    assert config.lora_alpha == 16


def test_a_switch_is_named_and_not_its_setting():
    with pytest.raises(ValueError, match="^use_qalora=True is not supported"):
        LoraConfig.from_dict(VALUES | {"qalora_group_size": 8, "use_qalora": True})


LATER = {"cache_file": None, "covariance_file": None, "verbose": False,
         "use_float16_for_covariance": False, "prune_temporary_fields": True}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("astra", LATER, {}),
        ("lora_ga", dataclasses.asdict(peft.LoraGAConfig()), {}),
        (
            "lora_ga",
            {"direction": "A2rBr", "scale": "unit"},
            {"direction": "A2rBr", "scale": "unit"},
        ),
        ("lora_ga", {"scale": "gd_scale", "stable_gamma": 4}, {"scale": "gd", "gamma": 4}),
    ],
)
@pytest.mark.wrong_types
def test_options_of_a_method_without_a_field_are_read(method, given, expected):
    """From a file of PEFT, and as PEFT's keyword argument; they are never written."""
    values = {"init_lora_weights": method, f"{method}_config": given}
    wanted = LoraConfig(init_lora_weights={"name": method, **expected}).initializer()
    for config in (LoraConfig.from_dict(VALUES | values), LoraConfig(**values)):
        assert config.initializer() == wanted
        assert config.to_dict().get(f"{method}_config") is None
        assert LoraConfig.from_dict(config.to_dict()).initializer() == wanted


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("astra", {"cache_file": "x"}, r"astra_config.cache_file='x' is not supported"),
        ("lora_ga", {"norm_clip": True}, r"lora_ga_config.norm_clip=True is not supported"),
        ("lora_ga", {"direction": "up"}, r"direction='up' is not supported: must be one of ArB2r"),
        ("lora_ga", [1], r"lora_ga_config=\[1\] is not supported: must be a mapping"),
    ],
)
@pytest.mark.wrong_types
def test_unsupported_options_of_a_method_are_named(method, given, message):
    values = {"init_lora_weights": method, f"{method}_config": given}
    for read in (lambda: LoraConfig.from_dict(VALUES | values), lambda: LoraConfig(**values)):
        with pytest.raises(ValueError, match=message):
            read()


USED = {
    "use_qalora": True,
    "trainable_token_indices": [0, 1],
    "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [5],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "velora_config": {"num_groups": 4},
    "monteclora_config": {"n": 1},
    "use_bdlora": {"nblocks": 2},
    "enable_lora": [True, False, True],
}


@pytest.mark.parametrize("name", USED)
def test_a_setting_that_means_something_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name}=.* is not supported"):
        LoraConfig.from_dict(VALUES | {name: USED[name]})


def test_a_file_with_replicated_layers_is_refused_for_them(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer_replication=.* is not supported"):
        LoraModel.from_pretrained(llama(), tmp_path)


def test_tied_modules_are_refused_where_they_would_be_tied():
    for extra in ({"modules_to_save": ["embed_tokens"]}, {"target_modules": ["lm_head"]}):
        with pytest.raises(ValueError, match="ensure_weight_tying=True is not supported"):
            LoraConfig.from_dict(VALUES | {"ensure_weight_tying": True} | extra)


def test_every_field_of_the_installed_peft_is_understood(tmp_path):
    values = {f.name: None for f in dataclasses.fields(peft.LoraConfig)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraConfig.from_dict(values | VALUES)
        ours = LoraConfig.from_dict(peft.LoraConfig(r=3, target_modules=["q_proj"]).to_dict())
    assert ours.r == 3


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
NO_CONFIG = {
    "a Git LFS pointer": (POINTER, "Git LFS pointer"),
    "no JSON": ("<html>", "not valid JSON"),
    "an empty file": ("", "not valid JSON"),
    "a list": ("[1]", "must contain a JSON object, not a list"),
    "null": ("null", "must contain a JSON object, not a NoneType"),
    "deep nesting": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "no peft_type": (json.dumps({"r": 8}), "peft_type is missing"),
    "another kind": (json.dumps({"peft_type": "LOHA", "r": 8}), "peft_type='LOHA'"),
    "a kind of another type": (json.dumps(VALUES | {"peft_type": ["LORA"]}), "peft_type="),
}


@pytest.mark.parametrize(("text", "message"), NO_CONFIG.values(), ids=NO_CONFIG)
def test_an_invalid_file_is_named_with_the_cause(text, message, tmp_path):
    write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        LoraConfig.from_pretrained(tmp_path)
    assert "adapter_config.json" in str(caught.value)
    base = llama()
    before = snapshot(base)
    tensors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(8, 64)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        LoraModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


def test_a_byte_order_mark_is_read(tmp_path):
    write(tmp_path, "\ufeff" + json.dumps(VALUES))
    assert LoraConfig.from_pretrained(tmp_path).r == 8


def test_a_pointer_file_instead_of_tensors_is_named(tmp_path):
    write(tmp_path, VALUES)
    (tmp_path / "adapter_model.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match="adapter_model.safetensors is a Git LFS pointer"):
        LoraModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("value", [[1], {"a": 1}, "x", 3.7, True, [[]], float("inf"), -1, 10**400])
@pytest.mark.parametrize(
    "name",
    [
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save",
        "layers_to_transform", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora",
        "lora_bias", "bias", "task_type", "fan_in_fan_out", "init_lora_weights", "revision",
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_a_named_error_or_right(name, value):
    message = None
    try:
        config = LoraConfig.from_dict(VALUES | {name: value})
    except ValueError as error:
        message = str(error)
    if message is None:
        assert getattr(config, name) == value
    else:
        assert name in message or "registered" in message


@pytest.mark.parametrize("start", [True, False, "gaussian", "Gaussian", "EVA", "mica"])
def test_a_kept_base_loads_however_it_was_started(start, tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"init_lora_weights": start, "eva_config": {"rho": 9.0}}))
    tensors = {
        f"base_model.model.{name}.{part}.weight": getattr(layer, part).detach() + 0.1
        for name, layer in model.layers.items()
        for part in ("lora_A", "lora_B")
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")  # a file of PEFT, without our header
    loaded = LoraModel.from_pretrained(llama(), tmp_path)
    assert all(torch.equal(layer.lora_B, torch.full_like(layer.lora_B, 0.1))
               for layer in loaded.layers.values())  # fmt: skip
    path.write_text(json.dumps(values | {"init_lora_weights": "of-the-future"}))
    with pytest.raises(ValueError, match="init_lora_weights='of-the-future' is not supported"):
        LoraModel.from_pretrained(llama(), tmp_path)
