"""Modules that are trained in full. PEFT selects them by the end of a name; files list them."""

import functools
from types import SimpleNamespace

import peft
import pytest
import torch
from measures import assert_gap, logits, train
from models import bert, llama, spread, token_batches
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    T5Config,
    T5ForSequenceClassification,
)

from lora_init import LoraConfig, LoraModel, get_peft_model

pytestmark = pytest.mark.sampled(3)


def distilbert(kind=DistilBertForSequenceClassification):
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=96, dim=48, hidden_dim=80, n_layers=2, n_heads=4, max_position_embeddings=64,
        num_labels=3,
    )  # fmt: skip
    return spread(kind(config)).eval()


class Tower(nn.Module):
    """A vision tower: several names end with `norm`, and the head is named like another part."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layernorm, self.query = nn.LayerNorm(12), nn.Linear(12, 12)
        self.inner = nn.ModuleDict({"norm": nn.LayerNorm(12), "head_norm": nn.LayerNorm(12)})
        self.norm, self.prehead, self.head = nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.inner["norm"](self.query(self.layernorm(x))) + self.inner["head_norm"](x)
        return SimpleNamespace(logits=self.head(self.prehead(self.norm(x))))


def tower_batches():
    return [{"x": torch.randn(3, 12, generator=torch.Generator().manual_seed(1))}]


CASES = {
    "distilbert, the task's heads": (
        distilbert, {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}, token_batches,
    ),
    "distilbert, named": (
        distilbert, {"target_modules": ["q_lin"], "modules_to_save": ["classifier"]}, token_batches,
    ),
    "distilbert, tokens": (
        functools.partial(distilbert, DistilBertForTokenClassification),
        {"target_modules": ["q_lin"], "task_type": "TOKEN_CLS"}, token_batches,
    ),
    "a language model's norm": (
        llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, token_batches,
    ),
    "embeddings and head": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        token_batches,
    ),
    "a tower's norm": (
        Tower, {"target_modules": ["query"], "modules_to_save": ["norm"]}, tower_batches,
    ),
    "a tower's head": (
        Tower, {"target_modules": ["query"], "modules_to_save": ["head"]}, tower_batches,
    ),
    "a tower's norm and head": (
        Tower, {"target_modules": ["query"], "modules_to_save": ["norm", "head"]}, tower_batches,
    ),
}  # fmt: skip
every_case = pytest.mark.parametrize(("make", "settings", "batches"), CASES.values(), ids=CASES)


@pytest.mark.filterwarnings("error:Some weights")
@pytest.mark.parametrize("method", ["pissa"])
@every_case
def test_peft_loads_ours(make, settings, batches, method, tmp_path):
    model = get_peft_model(make(), LoraConfig(r=2, init_lora_weights=method, **settings))
    expected = logits(train(model), batches())
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert_gap(logits(theirs, batches()), expected, 1e-5)
    ours = LoraModel.from_pretrained(make(), tmp_path).eval()
    assert_gap(logits(ours, batches()), expected, 1e-5)
    assert ours.plan.modules_to_save == model.plan.modules_to_save
    ours.save_pretrained(tmp_path / "again")
    first = load_file(tmp_path / "adapter_model.safetensors")
    assert first.keys() == load_file(tmp_path / "again" / "adapter_model.safetensors").keys()


@every_case
def test_ours_loads_pefts(make, settings, batches, tmp_path):
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, **settings))
    expected = logits(train(model), batches())
    model.save_pretrained(tmp_path)
    wrapped = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.utils.ModulesToSaveWrapper)
    }
    ours = LoraModel.from_pretrained(make(), tmp_path).eval()
    assert_gap(logits(ours, batches()), expected, 1e-6)
    assert set(ours.plan.modules_to_save) == wrapped
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert_gap(logits(theirs, batches()), expected, 1e-6)


def t5_classifier():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=96, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, num_labels=3,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, classifier_dropout=0.0,
    )  # fmt: skip
    return spread(T5ForSequenceClassification(config)).eval()


def test_a_head_that_peft_does_not_save_is_named(tmp_path):
    model = peft.get_peft_model(
        t5_classifier(), peft.LoraConfig(r=2, target_modules=["q"], task_type="SEQ_CLS")
    )
    train(model).save_pretrained(tmp_path)
    ids = torch.tensor([[5, 7, 9, 1]])
    expected = model(input_ids=ids).logits
    message = "no tensors for 'classification_head'.*weights of the base model"
    with pytest.warns(UserWarning, match=message):
        ours = LoraModel.from_pretrained(t5_classifier(), tmp_path).eval()
    torch.testing.assert_close(ours(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_module_that_peft_cannot_tell_from_an_adapted_one_is_named(tmp_path):
    config = LoraConfig(r=2, target_modules=["pre_classifier"], modules_to_save=["classifier"])
    model = train(get_peft_model(distilbert(), config))
    with pytest.warns(UserWarning, match="PEFT cannot load this adapter.*'pre_classifier'"):
        model.save_pretrained(tmp_path)
    ours = LoraModel.from_pretrained(distilbert(), tmp_path).eval()
    assert_gap(logits(ours, token_batches()), logits(model, token_batches()), 1e-6)


def test_a_missing_part_of_a_saved_module_is_refused(tmp_path):
    model = peft.get_peft_model(
        bert(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    )
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.classifier.bias"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="lacks '.*classifier.bias'"):
        LoraModel.from_pretrained(bert(), tmp_path)
