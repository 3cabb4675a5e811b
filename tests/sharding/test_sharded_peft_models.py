"""Starts of a PEFT model that FSDP2 has sharded, with two ranks, compared with one process."""

from functools import partial

import peft
import pytest
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from models import llama
from peft_training import logits as trained_logits
from peft_training import peft_model as trainers_model
from peft_training import trainer_of
from processes import run_ranks
from sharded import TARGETS, WORLD, batches, findings, gap, halves, join, leave, logits, sgd, train
from substitutes import random_llama
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from lora_init import initialize_peft_model
from lora_init.integrations.transformers import LoraInitCallback
from lora_init.weights.sharded import is_dtensor, whole

STARTS = {"pissa": "pissa", "eva": {"name": "eva", "rho": 1.0}, "lora_ga": "lora_ga"}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def peft_model(**settings):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **settings)
    torch.manual_seed(0)
    return peft.get_peft_model(llama(), config).eval()


def sharded_model(*, units=True, **settings):
    """As Accelerate shards a PEFT model: each layer is a unit, and the rest."""
    model = peft_model(**settings)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.base_model.model.model.layers if units else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def products(model):
    """s B A of each layer."""
    return {
        name: 2.0 * whole(module.lora_B["default"].weight) @ whole(module.lora_A["default"].weight)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def work(rank, folder, starts):
    join(rank, folder)
    leave({start: in_parts(start, rank, folder) for start in starts}, rank, folder)


def in_parts(start, rank, folder):
    data = halves(rank)
    model = sharded_model()
    held = {id(each) for group in sgd(model).param_groups for each in group["params"]}
    initialize_peft_model(model, STARTS[start], calibration=data)
    trained = {id(each) for each in model.parameters() if each.requires_grad}
    found = {"start": products(model), "first": logits(model, data), "same": held == trained}
    train(model, data)
    found["trained"], after = products(model), logits(model, data)
    state = get_model_state_dict(model, options=FULL)
    if rank == 0:
        model.save_pretrained(f"{folder}/{start}", state_dict=dict(state))
    other = sharded_model()
    initialize_peft_model(other, STARTS[start], calibration=data)
    set_model_state_dict(other, get_model_state_dict(model))
    found["loaded"] = gap({0: logits(other, data)}, {0: after})
    return found


def ran(starts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded_peft")
    run_ranks(partial(work, starts=starts), folder, WORLD)
    return folder, findings(folder)


@pytest.fixture(scope="module")
def pissa(tmp_path_factory):
    return ran(["pissa"], tmp_path_factory)


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return ran(["eva", "lora_ga"], tmp_path_factory)


@pytest.mark.parametrize(
    "start",
    [
        "pissa",
        *(pytest.param(one, marks=pytest.mark.exhaustive) for one in STARTS if one != "pissa"),
    ],
)
def test_two_ranks_are_one_process(request, start):
    folder, found = request.getfixturevalue("pissa" if start == "pissa" else "rest")
    model = peft_model()
    initialize_peft_model(model, STARTS[start], calibration=batches())
    first = products(model)
    trained = products(train(model, batches()))
    assert gap(first, trained) > 1e-3
    for rank, one in enumerate(rank[start] for rank in found):
        assert one["same"]
        assert gap(one["start"], first) <= 1e-6
        torch.testing.assert_close(
            one["first"], logits(llama(), halves(rank)), atol=2e-5, rtol=1e-5
        )
        assert gap(one["trained"], trained) <= 1e-5
        assert one["loaded"] <= 1e-6
    loaded = peft.PeftModel.from_pretrained(llama(), folder / start)
    torch.testing.assert_close(
        logits(loaded.eval(), batches()), logits(model, batches()), atol=1e-4, rtol=1e-4
    )


UNITS = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def shard_on_cpu(trainer):
    """Accelerate selects FSDP for accelerators only, but its code for FSDP2 runs on a CPU too."""
    state = trainer.accelerator.state
    for shared in (state._shared_state, PartialState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True


def train_by_trainer(rank, folder):
    join(rank, folder)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process it is a fork of
    found = {}
    for method in ("pissa", "eva"):
        callback = LoraInitCallback(method, batches=4, seed=5)
        trainer = trainer_of(
            trainers_model(f"{folder}/llama"), f"{folder}/{method}", callback, ddp_backend="gloo",
            fsdp=True, fsdp_config={"version": 2, **UNITS}, max_grad_norm=0.0,
        )  # fmt: skip
        shard_on_cpu(trainer)
        trainer.train()
        held = {id(each) for group in trainer.optimizer.param_groups for each in group["params"]}
        trained = {id(each) for each in trainer.model.parameters() if each.requires_grad}
        trainer.save_model(f"{folder}/{method}/saved")
        assert any(map(is_dtensor, trainer.model.parameters()))
        found[method] = products(trainer.model), held == trained
    leave(found, rank, folder)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_the_callback_initializes_what_the_trainer_has_sharded(tmp_path):
    random_llama(tmp_path / "llama", 32)
    run_ranks(train_by_trainer, tmp_path, WORLD)
    for method in ("pissa", "eva"):
        callback = LoraInitCallback(method, batches=4, seed=5)
        model = trainers_model(tmp_path / "llama")
        # Two ranks read two batches a step.
        trainer = trainer_of(
            model, tmp_path, callback, gradient_accumulation_steps=2, max_grad_norm=0.0
        )
        trainer.train()
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / method / "saved")
        expected = trained_logits(model)
        torch.testing.assert_close(trained_logits(loaded), expected, rtol=1e-3, atol=1e-3)
        for one, same in (rank[method] for rank in findings(tmp_path)):
            assert same
            assert gap(one, products(model)) < 1e-3
