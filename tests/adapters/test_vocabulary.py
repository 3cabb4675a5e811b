"""Resized vocabularies: the file contains the new rows, or loading names the missing ones."""

import json

import peft
import pytest
import torch
from measures import assert_gap, assert_unchanged, logits, snapshot, train
from models import bert, gpt2, llama, t5, t5_batches, token_batches
from safetensors.torch import load_file

from lora_init import LoraConfig, LoraModel, get_peft_model

pytestmark = pytest.mark.sampled(3)

SIZE = 103  # of 96
MODELS = {
    "llama": (llama, ["q_proj"], token_batches),
    "llama, tied": (lambda: llama(tied=True), ["q_proj"], token_batches),
    "gpt2": (gpt2, ["c_attn"], token_batches),
    "bert": (bert, ["query"], token_batches),
    "t5": (t5, ["q"], t5_batches),
}
every_model = pytest.mark.parametrize(("make", "targets", "batches"), MODELS.values(), ids=MODELS)


def resized(make, size=SIZE, seed=1):
    """A model with new rows, which depend on the seed."""
    model = make()
    before = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            new = module.weight[before:]
            new.copy_(0.3 * torch.randn(new.shape, generator=generator))
    return model.eval()


def with_new_tokens(batches):
    """Batches in which the new tokens occur."""
    return [
        {k: torch.where(v == 1, SIZE - 1, v) if k.endswith("ids") else v for k, v in batch.items()}
        for batch in batches()
    ]


@pytest.mark.parametrize("method", ["pissa"])
@every_model
def test_the_adapter_file_contains_the_rows(make, targets, batches, method, tmp_path):
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=method)
    model = train(get_peft_model(resized(make), config))
    expected = logits(model, with_new_tokens(batches))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.warns(UserWarning, match="the rows of .* are replaced"):
        ours = LoraModel.from_pretrained(resized(make, seed=2), tmp_path)
    assert_gap(logits(ours, with_new_tokens(batches)), expected, 1e-5)
    theirs = peft.PeftModel.from_pretrained(resized(make, seed=3), tmp_path)
    assert_gap(logits(theirs, with_new_tokens(batches)), expected, 1e-5)
    # Rows that were loaded are saved again without a request.
    ours.save_pretrained(tmp_path / "again")
    again = LoraModel.from_pretrained(resized(make, seed=4), tmp_path / "again")
    assert_gap(logits(again, with_new_tokens(batches)), expected, 1e-5)
    base = make()
    before = snapshot(base)
    with pytest.raises(ValueError, match=rf"resize_token_embeddings\({SIZE}\)"):
        LoraModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


@every_model
def test_a_file_without_them_is_refused_on_another_vocabulary(make, targets, batches, tmp_path):
    model = get_peft_model(resized(make), LoraConfig(r=2, target_modules=targets))
    expected = logits(train(model), with_new_tokens(batches))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = make()
    before = snapshot(base)
    with pytest.raises(ValueError, match=f"trained with a vocabulary of {SIZE} entries"):
        LoraModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
    with pytest.warns(UserWarning, match="are not those the adapter was trained with"):
        LoraModel.from_pretrained(resized(make, seed=2), tmp_path)
    same = LoraModel.from_pretrained(resized(make), tmp_path)
    assert_gap(logits(same, with_new_tokens(batches)), expected, 1e-6)


def saved_base(folder, make=llama):
    make().save_pretrained(folder)
    model = type(make()).from_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("size", [None, SIZE, 80])
def test_auto_compares_with_the_saved_base(size, tmp_path):
    """PEFT's rule: the vocabulary size in the base's configuration decides."""
    base = saved_base(tmp_path / "base")
    if size is not None:
        base.resize_token_embeddings(size)
    model = train(get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    rows = {key for key in written if "lora_" not in key}
    wanted = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert rows == (set() if size is None else wanted)
    theirs = peft.get_peft_model(base.__class__.from_pretrained(tmp_path / "base"),
                                 peft.LoraConfig(r=2, target_modules=["q_proj"]))  # fmt: skip
    if size is not None:
        theirs.get_base_model().resize_token_embeddings(size)
    theirs.save_pretrained(tmp_path / "theirs")
    assert rows == {
        key for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors")
        if "lora_" not in key
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("method", ["pissa", "loftq"])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"], "all-linear"])
def test_auto_saves_adapted_embeddings_as_peft_does(targets, method, tmp_path):
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=method)
    model = train(get_peft_model(resized(llama), config))
    expected = logits(model, with_new_tokens(token_batches))
    model.save_pretrained(tmp_path / "ours")
    written = load_file(next((tmp_path / "ours").glob("*.safetensors")))
    rows = {key for key in written if "lora_" not in key and "replacement" not in key}
    if method == "loftq":  # adapted embeddings have other weights now, and no rows to save
        assert not any("base_layer" in key for key in rows)
        return
    theirs = peft.get_peft_model(resized(llama), peft.LoraConfig(r=2, target_modules=targets))
    theirs.save_pretrained(tmp_path / "theirs")
    others = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {key for key in others if "lora_" not in key} <= rows
    assert bool(rows) == (targets != "all-linear")
    if rows:
        loaded = LoraModel.from_pretrained(resized(llama, seed=2), tmp_path / "ours")
        assert_gap(logits(loaded, with_new_tokens(token_batches)), expected, 1e-5)
        theirs = peft.PeftModel.from_pretrained(resized(llama, seed=3), tmp_path / "ours")
        assert_gap(logits(theirs, with_new_tokens(token_batches)), expected, 1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@every_model
def test_ours_loads_pefts_resized(make, targets, batches, tmp_path):
    model = peft.get_peft_model(resized(make), peft.LoraConfig(r=2, target_modules=targets))
    expected = logits(train(model), with_new_tokens(batches))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    base = resized(make, seed=2)
    with pytest.warns(UserWarning, match="the rows of .* are replaced"):
        ours = LoraModel.from_pretrained(base, tmp_path)
    assert_gap(logits(ours, with_new_tokens(batches)), expected, 1e-6)
    base = make()
    before = snapshot(base)
    with pytest.raises(ValueError, match=rf"resize_token_embeddings\({SIZE}\)"):
        LoraModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


def test_rows_are_restored_if_loading_fails(tmp_path, monkeypatch):
    from lora_init import adapters

    model = get_peft_model(resized(llama), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    base = resized(llama, seed=2)
    before = base.get_input_embeddings().weight.clone()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapters, "fill", fail)
    replaced = pytest.warns(UserWarning, match="the rows of .* are replaced")
    with pytest.raises(KeyboardInterrupt), replaced:
        LoraModel.from_pretrained(base, tmp_path)
    assert torch.equal(base.get_input_embeddings().weight, before)


def test_a_model_without_embeddings_says_so(tmp_path):
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="no get_input_embeddings.*No embeddings are saved"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
