"""A LoraModel in transformers' Trainer: what it saves, loads and reads."""

import inspect
from itertools import product

import pytest
from measures import assert_gap, logits
from models import bert, gpt2, llama, token_batches
from peft import PeftModel
from products import every_value
from transformers import Trainer, TrainingArguments

from lora_init import LoraConfig, LoraModel, get_peft_model

pytestmark = pytest.mark.sampled(3)

METHODS = ["pissa", "kaiming", "orthogonal", "loftq"]


def adapted(method="pissa", base=None, **settings):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=method, **settings
    )
    return get_peft_model(llama() if base is None else base, config)


def rows(count=8):
    batch = token_batches(count=1, size=count, padded=False)[0]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in batch["input_ids"]]


ARGUMENTS = {
    "max_steps": 4, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4,
    "learning_rate": 3e-3, "logging_steps": 1, "report_to": [], "use_cpu": True,
    "disable_tqdm": True, "dataloader_pin_memory": False, "lr_scheduler_type": "constant",
}  # fmt: skip


def trainer(model, folder, **settings):
    arguments = TrainingArguments(str(folder), **ARGUMENTS | settings)
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(4))


@pytest.mark.parametrize(
    ("method", "settings"),
    every_value(product(METHODS, [{}, {"use_dora": True}, {"bias": "all"}]), 2),
    ids=str,
)
def test_trainer_saves_an_adapter(method, settings, tmp_path):
    made = trainer(adapted(method, **settings), tmp_path / "run", save_steps=2)
    made.train()
    made.save_model(tmp_path / "final")
    expected = logits(made.model, token_batches())
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-4"):
        loaded = LoraModel.from_pretrained(llama(), folder)
        assert_gap(logits(loaded, token_batches()), expected, 1e-5)
        if method != "loftq":
            assert_gap(
                logits(PeftModel.from_pretrained(llama(), folder), token_batches()), expected, 1e-5
            )


def test_a_plain_save_writes_the_adapter_only(tmp_path):
    adapted().save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("make", [llama, gpt2, bert], ids=lambda make: make.__name__)
def test_it_shows_the_attributes_of_its_transformers_base(make):
    base = make()
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    assert model.base_model is base
    names = [name for name in dir(type(base)) if not name.startswith("__")]
    own = set(dir(LoraModel))
    for name in (name for name in names if name not in own):
        if inspect.isdatadescriptor(inspect.getattr_static(base, name, None)):
            continue  # some of them warn or raise
        value, expected = getattr(model, name), getattr(base, name)
        if inspect.ismethod(expected):
            assert value.__self__ is expected.__self__, name
        else:
            assert value is expected or value == expected, name
