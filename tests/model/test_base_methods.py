"""What an injected base model's own methods would write, upload or change."""

import copy
import gc
import pickle
from types import SimpleNamespace

import huggingface_hub
import pytest
from measures import assert_gap, logits, train
from models import gpt2, llama, token_batches
from torch import nn

from lora_init import LoraConfig, LoraModel, get_peft_model, reinitialize

pytestmark = pytest.mark.sampled(3)

CHANGING = ["push_to_hub", "add_adapter", "load_adapter", "dequantize"]


def adapted(make=llama, method="pissa"):
    return get_peft_model(
        make(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=method)
    )


@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_an_injected_base_saves_the_adapter(make, copied, tmp_path):
    model = train(adapted(make))
    expected = logits(model, token_batches())
    model = model if copied is None else copied(model)
    model.base_model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = LoraModel.from_pretrained(make(), tmp_path)
    assert_gap(logits(loaded, token_batches()), expected, 1e-5)


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("part", ["base", "backbone", "wrapper"])
def test_what_would_write_or_change_wrapped_layers_is_refused(name, part):
    model = adapted()
    owner = {"base": model.base_model, "backbone": model.base_model.model, "wrapper": model}[part]
    if part == "wrapper" and name == "push_to_hub":
        pytest.skip("it uploads the adapter")
    with pytest.raises(NotImplementedError, match=f"{name} of a model with an adapter is not"):
        getattr(owner, name)("x")


def test_a_part_of_the_base_is_not_saved(tmp_path):
    with pytest.raises(NotImplementedError, match=r"call save_pretrained of the LoraModel"):
        adapted().base_model.model.save_pretrained(tmp_path)


def test_a_base_whose_adapter_model_is_gone_is_not_saved(tmp_path):
    model = adapted()
    base = model.base_model
    del model
    gc.collect()
    with pytest.raises(NotImplementedError, match="save_pretrained of a model with an adapter"):
        base.save_pretrained(tmp_path)


def test_the_methods_come_back(tmp_path):
    for leave in (LoraModel.unload, LoraModel.merge_and_unload):
        model = adapted()
        base = leave(model)
        base.save_pretrained(tmp_path / leave.__name__)
        loaded = llama().from_pretrained(tmp_path / leave.__name__)
        assert_gap(logits(loaded, token_batches()), logits(base, token_batches()), 0.0)
    model = adapted()
    detached = model.detach_adapter()
    assert "save_pretrained" not in vars(model.base_model)
    model.attach_adapter(detached)
    model.base_model.save_pretrained(tmp_path / "again")
    again = reinitialize(model, LoraConfig(r=2, target_modules=["q_proj"]))
    again.base_model.save_pretrained(tmp_path / "restarted")
    assert LoraModel.from_pretrained(llama(), tmp_path / "restarted").peft_config.r == 2


class Keeper(nn.Module):
    """A library's wrapper that saves itself and what it holds, as a SentenceTransformer does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)

    def save(self, folder):
        self.model.save_pretrained(folder)


def test_a_wrapper_around_the_base_saves_the_adapter(tmp_path):
    keeper = Keeper(llama())
    model = get_peft_model(keeper.model, LoraConfig(r=4, target_modules=["q_proj"]))
    keeper.save(tmp_path)
    LoraModel.from_pretrained(llama(), tmp_path)
    del model
    model = get_peft_model(Keeper(llama()), LoraConfig(r=4, target_modules=["q_proj"]))
    for save in (model.save, model.base_model.save, model.base_model.model.save_pretrained):
        with pytest.raises(NotImplementedError, match="of a model with an adapter is not"):
            save(tmp_path)


def test_push_to_hub_uploads_the_adapter(monkeypatch, tmp_path):
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **settings):
            calls.append(("create", repo_id, settings["private"]))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **settings):
            LoraModel.from_pretrained(llama(), folder_path)
            with open(f"{folder_path}/README.md") as card:
                is_card = "library_name: peft" in card.read()
            calls.append(("upload", repo_id, settings["commit_message"], is_card))
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    made = adapted().push_to_hub("adapter", private=True, token="t", commit_message="m")
    assert made == "commit"
    assert calls == [
        ("token", "t"), ("create", "adapter", True), ("upload", "me/adapter", "m", True)
    ]  # fmt: skip


def test_attaching_twice_changes_nothing():
    model = adapted()
    detached = model.detach_adapter()
    model.attach_adapter(detached)
    layers = dict(model.base_model.named_modules())
    model.attach_adapter(detached)
    assert dict(model.base_model.named_modules()) == layers
    other = adapted().detach_adapter()
    with pytest.raises(RuntimeError, match="another adapter is attached"):
        model.attach_adapter(other)
