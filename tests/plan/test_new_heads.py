"""A head that is missing in the checkpoint is trained in full, whatever its name is."""

import json
import warnings

import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from lora_init import LoraConfig, LoraModel, get_peft_model

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 24, "vocab_size": 50}  # fmt: skip
BERT = BertConfig(**SMALL, max_position_embeddings=16, num_labels=3)
LLAMA = LlamaConfig(**SMALL, num_labels=3, pad_token_id=0)
VIT = ViTConfig(image_size=16, patch_size=8, num_labels=3,
                **{k: v for k, v in SMALL.items() if k != "vocab_size"})  # fmt: skip
CASES = {
    "sequences": (BertModel(BERT), BertForSequenceClassification, "classifier", ["query"]),
    "tokens": (BertModel(BERT), BertForTokenClassification, "classifier", "all-linear"),
    "answers": (BertModel(BERT), BertForQuestionAnswering, "qa_outputs", ["query"]),
    "decoder": (LlamaForCausalLM(LLAMA), LlamaForSequenceClassification, "score", None),
    "images": (ViTModel(VIT), ViTForImageClassification, "classifier", "all-linear"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each case, a checkpoint without the head and one with it."""
    found = {}
    for case, (base, headed, _, _) in CASES.items():
        without, with_head = (tmp_path_factory.mktemp(case) / part for part in ("base", "whole"))
        base.save_pretrained(without)
        headed(base.config).save_pretrained(with_head)
        found[case] = without, with_head
    return found


def settings(case):
    return LoraConfig(r=2, target_modules=CASES[case][3])


@pytest.mark.parametrize("case", CASES)
def test_a_new_head_is_trained_saved_and_loaded(case, folders, tmp_path):
    _, headed, head, _ = CASES[case]
    base = headed.from_pretrained(folders[case][0])
    plan = get_peft_model(base, settings(case), dry_run=True)
    assert plan.modules_to_save == (head,)
    assert f"trained whole: {head}" in str(plan)
    model = get_peft_model(base, settings(case))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any(f"{head}.trained_module" in name for name in trained)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == [head]
    fresh = headed.from_pretrained(folders[case][1])
    again = LoraModel.from_pretrained(fresh, tmp_path)
    state = model.state_dict()
    for name, value in again.state_dict().items():
        if "trained_module" in name or "lora_" in name:
            torch.testing.assert_close(value, state[name])
    theirs = peft.PeftModel.from_pretrained(headed.from_pretrained(folders[case][1]), tmp_path)
    saved = theirs.base_model.model.get_submodule(head).modules_to_save["default"]
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(value, state[f"base_model.{head}.trained_module.{name}"])


@pytest.mark.parametrize("case", CASES)
def test_a_head_of_the_checkpoint_stays_as_it_is(case, folders):
    base = CASES[case][1].from_pretrained(folders[case][1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plan = get_peft_model(base, settings(case), dry_run=True)
    assert plan.modules_to_save == ()
    assert plan.left_out == ()


def test_a_new_head_that_is_named_as_a_target_is_adapted(folders):
    base = BertForTokenClassification.from_pretrained(folders["tokens"][0])
    config = LoraConfig(r=2, target_modules=["query", "classifier"])
    plan = get_peft_model(base, config, dry_run=True)
    assert plan.modules_to_save == ()
    assert plan.targets[-1].name == "classifier"


def test_other_new_weights_are_named(folders):
    """BERT's pooler is part of the backbone, and a masked language model's checkpoint has none."""
    base = BertForSequenceClassification.from_pretrained(
        folders["answers"][1], ignore_mismatched_sizes=True
    )
    with pytest.warns(UserWarning, match=r"bert\.pooler: its weights are new.*modules_to_save"):
        plan = get_peft_model(base, LoraConfig(r=2, target_modules=["query"]), dry_run=True)
    assert plan.modules_to_save == ("classifier",)


def test_a_resized_vocabulary_is_not_a_head(folders):
    base = LlamaForCausalLM.from_pretrained(folders["decoder"][0])
    base.resize_token_embeddings(60)
    plan = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]), dry_run=True)
    assert plan.modules_to_save == ()
    assert plan.left_out == ()
