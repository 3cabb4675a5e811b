"""Initialized PEFT models in TRL's trainers: step 0, training, and the saved adapter."""

import math
import warnings

import peft
import pytest
import torch
from measures import assert_gap, relative_gap
from packing import packed
from products import thinned
from substitutes import random_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_init import initialize_peft_model
from lora_init.integrations.transformers import LoraInitCallback

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

pytestmark = [
    pytest.mark.sampled(3),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("llama"), 64)


def base_model(folder, kind):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # so that logits depend on the adapted weights
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    if kind == "bfloat16":
        return model.bfloat16()
    return model if kind == "float32" else packed(model, kind)


def configuration():
    return peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )


def arguments(cls, folder, **settings):
    return cls(
        str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", bf16=False,
        logging_steps=1, dataloader_pin_memory=False, gradient_checkpointing=False, **settings,
    )  # fmt: skip


def trainer_of(task, folder, model, output, peft_config=None, callbacks=()):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if task == "sft":
        rows = [{"text": f"{n} + {n} = {2 * n}"} for n in range(8)]
        return trl.SFTTrainer(
            model, arguments(trl.SFTConfig, output), train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer, peft_config=peft_config, callbacks=[*callbacks],
        )  # fmt: skip
    rows = [
        {"prompt": f"{n} + {n} = ", "chosen": f"{2 * n}", "rejected": f"{3 * n + 1}"}
        for n in range(8)
    ]
    return trl.DPOTrainer(
        model, args=arguments(trl.DPOConfig, output),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=peft_config, callbacks=[*callbacks],
    )  # fmt: skip


def logits(model):
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


CASES = [
    ("sft", "float32", "prebuilt", "pissa"), ("sft", "nf4", "inside", "pissa"),
    ("sft", "nf4", "prebuilt", "olora"), ("dpo", "float32", "inside", "pissa"),
    ("dpo", "bfloat16", "prebuilt", "olora"), ("dpo", "nf4", "prebuilt", "pissa"),
    ("dpo", "nf4", "inside", "olora"), ("dpo", "int8", "prebuilt", "pissa"),
    ("sft", "float32", "callback", "corda"), ("dpo", "nf4", "callback", "pissa"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "kind", "where", "method"),
    thinned(
        CASES,
        lambda task, kind, where, method: (task, where),
        lambda task, kind, where, method: kind,
    ),
)
def test_a_started_model_in_a_trainer(task, kind, where, method, folder, tmp_path):
    expected = logits(base_model(folder, kind))
    model = base_model(folder, kind)
    if where == "prebuilt":
        model = peft.get_peft_model(model, configuration())
        initialize_peft_model(model, method)
        trainer = trainer_of(task, folder, model, tmp_path)
    elif where == "callback":
        callbacks = [LoraInitCallback(method, batches=2)]
        trainer = trainer_of(task, folder, model, tmp_path, configuration(), callbacks)
    else:
        trainer = trainer_of(task, folder, model, tmp_path, configuration())
        initialize_peft_model(trainer.model, method)
    # Trainers cast the adapters of quantized models to bfloat16.
    step_0 = 1e-5 if kind == "float32" else 2e-2
    assert_gap(logits(trainer.model), expected, step_0)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    if task == "dpo":  # policy and reference agree at the first step
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4 if kind == "float32" else 0.02)
    trained = logits(trainer.model)
    assert relative_gap(trained, expected) > 2 * step_0
    trainer.save_model(tmp_path / "saved")
    with warnings.catch_warnings():
        loaded = peft.PeftModel.from_pretrained(base_model(folder, kind), tmp_path / "saved")
    assert_gap(logits(loaded), trained, 1e-5 if kind == "float32" else 2e-2)
