"""Starts of a PEFT model that FSDP2 has sharded, with two ranks, compared with one process."""

from functools import partial

import peft
import pytest
import torch
from models import llama
from processes import run_ranks
from sharded import TARGETS, WORLD, batches, findings, gap, halves, join, leave, logits, sgd, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_init import initialize_peft_model
from lora_init.peft_models.resume import Expected, stop_waiting, wait
from lora_init.weights.sharded import whole

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
    found["filled"] = filled(sharded_model(), model, start)
    return found


def filled(waiting, model, start="pissa"):
    """The differences of a model to one that waited for its start and was filled with its state."""
    wait(waiting, Expected(STARTS[start], subtracts=start != "eva"))
    offered = peft.get_peft_model_state_dict(waiting)
    given = peft.get_peft_model_state_dict(model)
    assert {key: each.shape for key, each in offered.items()} == {
        key: each.shape for key, each in given.items()
    }
    peft.set_peft_model_state_dict(waiting, given)
    stop_waiting(waiting)
    return gap(tensors(waiting), tensors(model))


def tensors(model):
    """The factors, and A0 and B0 of the layers whose base was changed."""
    found = {name: whole(one) for name, one in model.named_parameters() if "lora_" in name}
    starts = dict(model.named_buffers())
    return found | {name: starts[name] for name in starts if ".base_layer.initial_" in name}


def other_layers(rank, folder):
    """A grouped convolution and an embedding, trained and filled into a model that waits."""
    join(rank, folder)
    mesh = init_device_mesh("cpu", (WORLD,))
    models = []
    for _ in range(2):
        layers = nn.Sequential(nn.Embedding(20, 8), nn.Conv1d(8, 12, 3, groups=2))
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0.0", "0.1"])
        model = peft.get_peft_model(nn.Sequential(layers), config)
        fully_shard(layers, mesh=mesh)
        models.append(fully_shard(model, mesh=mesh))
    initialize_peft_model(models[1], "pissa")
    with torch.no_grad():
        for each in models[1].parameters():
            if each.requires_grad:
                each.mul_(1.5)
    leave((filled(*models), len(tensors(models[0]))), rank, folder)


@pytest.mark.filterwarnings("ignore")
def test_a_start_is_restored_in_other_layers(tmp_path):
    run_ranks(other_layers, tmp_path, WORLD)
    assert findings(tmp_path) == [(0.0, 8)] * WORLD


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
        assert one["filled"] == 0
    loaded = peft.PeftModel.from_pretrained(llama(), folder / start)
    torch.testing.assert_close(
        logits(loaded.eval(), batches()), logits(model, batches()), atol=1e-4, rtol=1e-4
    )
