"""The guide's code for trainers that the tests lack, run on copies of their interfaces.

Read from the wheels of LLaMA-Factory 0.9.5, ms-swift 4.6.0 and lightning 2.6.6. An installed
Lightning is used itself.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from peft_training import Rows, peft_model, trainer_of
from substitutes import random_llama
from torch import nn
from transformers import AutoModelForCausalLM

from lora_init.peft_models.start import records

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "trainers.md"

pytestmark = pytest.mark.filterwarnings("ignore")


def code(first_words):
    """The page's only block that contains these words."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if first_words in block]
    return found.replace('"eva", batches=32', '"eva", batches=2')


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a block of the page with modules of these names."""

    def block(first_words, modules, **names):
        for path, attributes in modules.items():
            parts = path.split(".")
            for count in range(1, len(parts) + 1):
                name = ".".join(parts[:count])
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
            vars(sys.modules[path]).update(attributes)
        monkeypatch.chdir(tmp_path)
        exec(compile(code(first_words), str(PAGE), "exec"), names)

    return block


@pytest.fixture
def folder(tmp_path):
    return random_llama(tmp_path / "llama", 32)


def test_llama_factory(run, folder, tmp_path):
    models = []

    def run_exp(args=None, callbacks=None):  # llamafactory/train/tuner.py
        trainer = trainer_of(peft_model(folder), tmp_path, *callbacks)
        trainer.train()
        models.append(trainer.model)

    run("import run_exp", {"llamafactory.train.tuner": {"run_exp": run_exp}})
    assert records(models[0])["default"].plan.initializer.name == "eva"


@pytest.mark.parametrize("is_train", [True, False])
def test_llama_factory_v1(run, folder, is_train):
    registry, models = {}, []

    class PeftPlugin:  # llamafactory/v1/utils/plugin.py
        def __init__(self, name=None):
            self.name = name

        def register(self, method_name="__call__"):
            return lambda function: registry.setdefault(self.name, function)

    def get_lora_model(model, config, is_train=False):
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))

    def run_sft(args=None):  # ModelEngine calls the plugin so
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        models.append(registry["lora"](base, {"name": "lora"}, is_train))

    run(
        "import run_sft",
        {
            "llamafactory.v1.plugins.model_plugins.peft": {
                "PeftPlugin": PeftPlugin,
                "get_lora_model": get_lora_model,
            },
            "llamafactory.v1.trainers.sft_trainer": {"run_sft": run_sft},
        },
    )
    assert bool(records(models[0])) == is_train


def test_ms_swift_starts_and_resumes(run, folder, tmp_path):
    """ms-swift loads the adapter of a checkpoint before it makes the trainer."""
    callbacks_map = {}
    run("import callbacks_map", {"swift.callbacks": {"callbacks_map": callbacks_map}})
    settings = {"save_strategy": "steps", "save_steps": 2}
    first = callbacks_map["lora_init"](None, None)
    whole = trainer_of(peft_model(folder), tmp_path, first, **settings)
    whole.train()
    assert first.report.method == "eva"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-2", is_trainable=True)
    second = callbacks_map["lora_init"](None, None)
    resumed = trainer_of(loaded, tmp_path, second, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.report is None
    expected = dict(whole.model.named_parameters())
    for name, value in resumed.model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


class Trainer:
    """Of lightning.Trainer, the loop over one loader. It takes a list for several loaders."""

    def __init__(self, *, max_steps=-1, accelerator="auto"):
        self.max_steps = max_steps

    def fit(self, model, train_dataloaders=None):
        assert not isinstance(train_dataloaders, list)
        optimizer = model.configure_optimizers()
        for _ in range(self.max_steps):
            for index, batch in enumerate(train_dataloaders):
                optimizer.zero_grad()
                model.training_step(batch, index).backward()
                optimizer.step()


def test_lightning(run, folder, tmp_path):
    modules = {"lightning": {"LightningModule": nn.Module, "Trainer": Trainer}}
    if importlib.util.find_spec("lightning"):
        modules = {}
    model = peft_model(folder)
    batches = [{key: value[None] for key, value in Rows()[index].items()} for index in (0, 1)]
    run("import lightning", modules, model=model, batches=batches)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert records(model)["default"].plan.initializer.name == "corda"
    ids = batches[0]["input_ids"]
    torch.testing.assert_close(
        loaded.eval()(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5
    )
