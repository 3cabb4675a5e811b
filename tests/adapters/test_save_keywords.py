"""Keywords that trainers and scripts pass to `save_pretrained`."""

import inspect
import json

import peft
import pytest
import torch
from measures import assert_gap, logits, train
from models import bert, llama, token_batches
from safetensors.torch import load_file

from lora_init import LoraConfig, LoraModel, get_peft_model

pytestmark = pytest.mark.sampled(3)


def adapted(method="pissa", make=llama, **settings):
    settings = {"r": 2, "target_modules": ["q_proj"]} | settings
    return train(get_peft_model(make(), LoraConfig(init_lora_weights=method, **settings)))


ACCEPTED = {
    "safe_serialization": True,
    "selected_adapters": ["default"],
    "save_embedding_layers": False,
    "is_main_process": True,
    "path_initial_model_for_weight_conversion": None,
    "state_dict": None,
    "save_function": torch.save,
    "max_shard_size": "5GB",
    "push_to_hub": False,
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_keyword_of_trainers_is_accepted(name, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(str(tmp_path / "with"), **{name: ACCEPTED[name]})
    files = (tmp_path / folder / "adapter_model.safetensors" for folder in ("plain", "with"))
    first, second = map(load_file, files)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_positional_arguments_have_pefts_order():
    theirs = list(inspect.signature(peft.PeftModel.save_pretrained).parameters)[2:-1]
    ours = list(inspect.signature(LoraModel.save_pretrained).parameters)[2:]
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"safe_serialization": False}, ValueError, "safe_serialization=False.*pickle"),
        ({"selected_adapters": ["other"]}, ValueError, r"selected_adapters=\['other'\]"),
        ({"selected_adapters": []}, ValueError, r"selected_adapters=\[\]"),
        ({"save_embedding_layers": "yes"}, ValueError, "save_embedding_layers='yes'"),
        ({"push_to_hub": True}, ValueError, "push_to_hub=True"),
        ({"state_dict": {}}, ValueError, "state_dict lacks 'base_model.*lora_A'"),
        ({"portabel": True}, TypeError, "unexpected keyword argument 'portabel'"),
    ],
)
def test_what_is_not_supported_is_refused_and_nothing_written(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        adapted().save_pretrained(tmp_path / "folder", **settings)
    assert not (tmp_path / "folder").exists()


def test_only_the_main_process_writes(tmp_path):
    adapted().save_pretrained(tmp_path / "folder", is_main_process=False, state_dict={})
    assert not (tmp_path / "folder").exists()


def test_a_conversion_that_is_not_needed_gives_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="already fits the original base model"):
        adapted().save_pretrained(tmp_path, path_initial_model_for_weight_conversion="init")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


CASES = {
    "kaiming": ("kaiming", llama, {}),
    "pissa": ("pissa", llama, {"use_dora": True}),
    "loftq": ("loftq", llama, {}),
    "head and biases": (
        "pissa", bert, {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"},
    ),
    "own biases": ("kaiming", bert, {"target_modules": ["query"], "bias": "lora_only"}),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("method", "make", "settings"), CASES.values(), ids=CASES)
def test_a_gathered_state_dict_is_what_is_written(method, make, settings, prefix, tmp_path):
    model = adapted(method, make, **settings)
    gathered = {prefix + key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model, token_batches())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()  # as if this shard were on another rank
    model.save_pretrained(tmp_path, state_dict=gathered)
    loaded = LoraModel.from_pretrained(make(), tmp_path)
    assert_gap(logits(loaded, token_batches()), expected, 1e-5)
    missing = next(key for key in gathered if key.endswith("lora_A"))
    some = {key: value for key, value in gathered.items() if key != missing}
    with pytest.raises(ValueError, match="state_dict lacks 'base_model"):
        model.save_pretrained(tmp_path, state_dict=some)
