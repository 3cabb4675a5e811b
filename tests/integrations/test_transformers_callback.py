"""`LoraInitCallback` in transformers' Trainer: one start, a resume, and files for PEFT."""

import os
from datetime import timedelta

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from peft_training import Rows, factors, logits, peft_model, trainer_of
from processes import run_ranks
from substitutes import random_llama
from torch import distributed
from transformers import AutoModelForCausalLM

from lora_init import calibrate, initialize_peft_model
from lora_init.config.lora_config import LoraConfig
from lora_init.integrations.transformers import LoraInitCallback
from lora_init.peft_models.start import records

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("llama"), 32)


class Snapshot(LoraInitCallback):
    """The callback, with a copy of the factors that the training starts from."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.factors = factors(model)
        self.trained = {id(p) for group in optimizer.param_groups for p in group["params"]}


def _train_on_one_rank(rank, output):
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process it is a fork of
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # looked at, not used
    distributed.init_process_group(
        "gloo", init_method=f"file://{output}/store", rank=rank, world_size=2,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    callback = Snapshot("eva", batches=4, seed=5)
    trainer = trainer_of(peft_model(f"{output}/llama"), output, callback, ddp_backend="gloo")
    trainer.train()
    assert trainer.model_wrapped is not trainer.model
    torch.save((callback.factors, factors(trainer.model)), f"{output}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_start_alike_and_train_together(tmp_path):
    """Each reads half of the examples; both get the factors of one process with all of them."""
    random_llama(tmp_path / "llama", 32)
    run_ranks(_train_on_one_rank, tmp_path)
    start, end = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    callback = Snapshot("eva", batches=4, seed=5)
    trainer_of(peft_model(tmp_path / "llama"), tmp_path, callback).train()
    for name, value in callback.factors.items():
        assert torch.equal(start[0][name], start[1][name])
        torch.testing.assert_close(start[0][name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(end[0][name], end[1][name])
        assert not torch.equal(end[0][name], start[0][name])


@pytest.mark.parametrize("method", ["pissa", "corda", "lora_ga", "kaiming"])
def test_the_factors_are_those_of_the_function(folder, tmp_path, method):
    callback = Snapshot(method, batches=3, seed=5)
    trainer = trainer_of(peft_model(folder), tmp_path, callback)
    trainer.train()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(5))
    rows = [Rows()[i] for i in order[:6].tolist()]
    batches = [
        {key: torch.stack([row[key] for row in rows[i : i + 2]]) for key in rows[0]}
        for i in (0, 2, 4)
    ]
    expected = peft_model(folder)
    initialize_peft_model(expected, method, calibration=batches, seed=5)
    for name, value in factors(expected).items():
        torch.testing.assert_close(callback.factors[name], value)
    assert callback.report.method == method
    assert [layer.rank for layer in callback.report.layers] == [4] * len(callback.report.layers)


def test_eva_keeps_its_ranks_and_the_optimizers_tensors(folder, tmp_path):
    callback = Snapshot("eva", batches=4)
    trainer = trainer_of(peft_model(folder), tmp_path, callback)
    trainer.train()
    parameters = {n: p for n, p in trainer.model.named_parameters() if "lora_" in n}
    assert {id(p) for p in parameters.values()} == callback.trained
    assert {p.shape[0] for n, p in parameters.items() if "lora_A" in n} == {4}
    changed = [n for n, p in parameters.items() if not torch.equal(p, callback.factors[n])]
    assert len(changed) == len(parameters)


def test_the_order_of_the_training_does_not_change(folder, tmp_path):
    """Calibration draws from its own generators: kaiming's losses are the same with it."""

    class Calibrated(LoraInitCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            self.method = "eva"
            self._calibration(kwargs["model"], train_dataloader)

    def losses(callback):
        trainer = trainer_of(peft_model(folder), tmp_path, callback)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(Calibrated("eva", batches=16)) == losses(None)


@pytest.mark.parametrize("method", ["pissa", "eva", "loftq"])
def test_a_resumed_training_equals_an_uninterrupted_one(folder, tmp_path, method):
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(
        peft_model(folder), tmp_path, LoraInitCallback(method, batches=2), **settings
    )
    whole.train()
    callback = LoraInitCallback(method, batches=2)
    resumed = trainer_of(peft_model(folder), tmp_path, callback, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.report is None
    torch.testing.assert_close(logits(resumed.model), logits(whole.model), rtol=1e-5, atol=1e-5)
    assert [e["loss"] for e in resumed.state.log_history if "loss" in e][-2:] == pytest.approx(
        [e["loss"] for e in whole.state.log_history if "loss" in e][-2:], rel=1e-5
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_peft_loads_what_the_trainer_saves(folder, tmp_path, accumulation):
    callback = LoraInitCallback("pissa")
    trainer = trainer_of(
        peft_model(folder), tmp_path, callback, gradient_accumulation_steps=accumulation
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("when", ["before the trainer is made", "afterwards"])
def test_a_model_that_has_a_start_keeps_it(folder, tmp_path, when):
    model = peft_model(folder)
    model.save_pretrained(tmp_path / "plain")
    if when == "before the trainer is made":
        initialize_peft_model(model, "olora")
    callback = LoraInitCallback("pissa")
    trainer = trainer_of(model, tmp_path, callback)
    if when == "afterwards":
        initialize_peft_model(model, "olora")
    trainer.train()
    assert callback.report is None
    assert records(model)["default"].plan.initializer.name == "olora"
    with pytest.raises(ValueError, match="olora has changed the base of this model"):
        model.load_adapter(tmp_path / "plain", "default")


def test_statistics_may_come_from_elsewhere(folder, tmp_path):
    model = peft_model(folder)
    base = model.get_base_model()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="corda")
    batch = {key: value[None] for key, value in Rows()[0].items()}
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = calibrate(plain, config, [batch])
    callback = LoraInitCallback("corda", calibration=found)
    trainer_of(model, tmp_path, callback).train()
    assert callback.report.method == "corda"
    assert base is model.get_base_model()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "gora"}, "chooses the ranks, and the optimizer has been built"),
        ({"method": "pisa"}, "did you mean 'pissa'"),
        ({"method": "eva", "calibration": "valid"}, "must be 'train', batches"),
        ({"method": "eva", "batches": 0}, "batches=0 is not supported"),
    ],
)
def test_mistakes_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoraInitCallback(**arguments)


def test_a_model_without_peft_is_refused(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(TypeError, match="must be a PEFT model"):
        trainer_of(base, tmp_path, LoraInitCallback("pissa")).train()
