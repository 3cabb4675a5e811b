"""Wrong arguments of a call: each is named, with what it must be, and nothing is changed."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from models import llama, token_batches
from networks import Chain, chain_calibration
from processes import run_ranks

from lora_init import LoraConfig, WithLoss, calibrate, get_peft_model, registry

pytestmark = pytest.mark.wrong_types

EVA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "eva"}


def single_batches():
    batch = token_batches(1)[0]
    from transformers import BatchEncoding

    return {
        "mapping": batch,
        "encoding": BatchEncoding(batch),
        "number": 5,
        "string": "some text",
        "path": b"some text",
        "tensor": batch["input_ids"],
        "function": len,
        "with_loss": WithLoss(batch, lambda model, batch: 0.0),
    }


@pytest.mark.parametrize("kind", single_batches())
def test_what_is_not_an_iterable_of_batches_is_refused(kind):
    model, given = llama(), single_batches()[kind]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TypeError, match=r"^calibration(\.batches)?=.*must be an iterable.*list"):
        get_peft_model(model, LoraConfig(**EVA), calibration=given)
    with pytest.raises(TypeError, match=r"^batches(\.batches)?=.*must be an iterable"):
        calibrate(model, LoraConfig(**EVA), given)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("given", [[], iter([]), (batch for batch in ())])
def test_no_batch_at_all_is_named(given):
    with pytest.raises(ValueError, match="calibration: the iterable gave no batch"):
        get_peft_model(llama(), LoraConfig(**EVA), calibration=given)


def test_an_exhausted_generator_is_named():
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="eva")
    batches = iter(chain_calibration())
    get_peft_model(Chain(), config, calibration=batches)
    with pytest.raises(ValueError, match="a generator that was used before is empty"):
        get_peft_model(Chain(), config, calibration=batches)


@pytest.mark.parametrize(
    "model",
    ["meta-llama/Llama-2-7b-hf", None, 5, {"a": 1}, Chain, np.zeros(3), torch.zeros(3)],
    ids=lambda m: type(m).__name__,
)
def test_a_model_that_is_not_a_module_is_refused(model):
    config = LoraConfig(target_modules=["q"], init_lora_weights="eva")
    for use in (
        lambda: get_peft_model(model, config),
        lambda: get_peft_model(model, config, dry_run=True),
        lambda: calibrate(model, config, chain_calibration()),
    ):
        with pytest.raises(TypeError, match=r"^model=[\s\S]* must be a torch.nn.Module"):
            use()


@pytest.mark.parametrize("config", [None, "eva", {"r": 4}, 5])
def test_a_configuration_of_another_class_is_refused(config):
    with pytest.raises(TypeError, match="peft_config is a .*pass a lora_init.LoraConfig"):
        get_peft_model(Chain(), config)
    with pytest.raises(TypeError, match="configs is a .*pass a lora_init.LoraConfig"):
        calibrate(Chain(), config if config != {"r": 4} else [config], chain_calibration())


def use_first(rank, folder):
    """In a fork, which may forget that the methods were imported: eight threads ask for one."""
    registry._registry, registry._METHODS.loaded = {}, False
    for name in [name for name in sys.modules if name.startswith("lora_init.initializers")]:
        del sys.modules[name]
    ready = threading.Barrier(8)

    def first(number):
        ready.wait()
        if number % 2:
            return registry.get_initializer("pissa").name
        return next(spec.name for spec in registry.list_initializers("pissa"))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(first, range(8))) == ["pissa"] * 8


def test_the_first_use_of_the_registry_may_come_from_many_threads(tmp_path):
    """Every thread finds every method, whichever of them imports them."""
    run_ranks(use_first, tmp_path, world=1)
