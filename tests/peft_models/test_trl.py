"""A LoraModel in TRL's trainers, which replace its forward and read the base's attributes."""

import copy

import pytest
import torch
from measures import assert_gap, logits
from models import VOCABULARY, llama, token_batches
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_init import LoraConfig, LoraModel, get_peft_model

pytestmark = pytest.mark.sampled(3)

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ARGUMENTS = {
    "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 1,
    "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    "bf16": False, "save_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{index}": index for index in range(3, VOCABULARY)}
    made = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "?": 2} | words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="?"
    )


def sentences(count, length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()
    return [" ".join(f"w{index}" for index in row) for row in ids]


def adapted(method, base=None):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=method)
    return get_peft_model(llama() if base is None else base, config)


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fine_tuned(model, folder, tokenizer, **settings):
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(folder), **ARGUMENTS | settings),
        train_dataset=datasets.Dataset.from_dict({"text": sentences(8, 12, 0)}),
        processing_class=tokenizer,
    )
    return trainer, losses(trainer)


def test_sft_equals_pefts(tokenizer, tmp_path):
    model = adapted(True)
    model.save_pretrained(tmp_path / "start")
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "start", is_trainable=True)
    _, expected = fine_tuned(theirs, tmp_path, tokenizer)
    trainer, found = fine_tuned(model, tmp_path, tokenizer)
    assert found == pytest.approx(expected, abs=1e-5)
    trainer.save_model(tmp_path / "end")
    loaded = LoraModel.from_pretrained(llama(), tmp_path / "end")
    assert_gap(logits(loaded, token_batches()), logits(theirs, token_batches()), 1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_sft_starts_at_the_base_models_loss(bf16, tokenizer, tmp_path):
    _, found = fine_tuned(adapted("pissa"), tmp_path, tokenizer, bf16=bf16)
    _, expected = fine_tuned(adapted(True), tmp_path, tokenizer, bf16=bf16)
    assert found[0] == pytest.approx(expected[0], abs=1e-2 if bf16 else 1e-5)
    assert found[1] != expected[1]


@pytest.mark.parametrize(
    ("method", "reference"),
    [("pissa", "given"), ("pissa", "loaded"), ("pissa", "computed before"), (True, "loaded")],
)
def test_dpo(method, reference, tokenizer, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    pairs = zip(("prompt", "chosen", "rejected"), (1, 2, 3), strict=True)
    trainer = trl.DPOTrainer(
        adapted(method, base),
        ref_model=copy.deepcopy(llama()) if reference == "given" else None,
        args=trl.DPOConfig(
            str(tmp_path), precompute_ref_log_probs=reference == "computed before", **ARGUMENTS
        ),
        train_dataset=datasets.Dataset.from_dict({k: sentences(8, 5, seed) for k, seed in pairs}),
        processing_class=tokenizer,
    )
    found = losses(trainer)
    # At step 0 the model is its reference: the loss is log 2.
    assert found[0] == pytest.approx(0.693147, abs=1e-5)
    assert found[1] != found[0]
