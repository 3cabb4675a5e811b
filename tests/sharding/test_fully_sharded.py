"""An adapter on a base that FSDP2 has sharded, with two ranks, compared with one process."""

from functools import partial

import pytest
import torch
from models import llama
from processes import run_ranks
from products import chosen
from sharded import (
    WORLD,
    batches,
    config,
    findings,
    gap,
    halves,
    join,
    leave,
    logits,
    products,
    train,
)
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_init import LoraModel, get_peft_model

STARTS = {
    "pissa": {"init_lora_weights": "pissa"},
    "eva": {"init_lora_weights": "eva"},
    "dora": {"init_lora_weights": "pissa", "use_dora": True, "bias": "all"},
    "kaiming": {"init_lora_weights": True},
    "corda": {"init_lora_weights": "corda"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "lora_xs": {"init_lora_weights": "lora_xs"},
}
FEW = {"pissa", "eva"}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def sharded_llama(units=True):
    """Each layer and the rest, or the whole model as one unit."""
    model = llama()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers if units else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def work(rank, folder, starts):
    join(rank, folder)
    found = {start: trained_by_halves(start, rank, folder) for start in starts}
    if "pissa" in starts:
        found["own units"] = in_own_units(halves(rank))
    leave(found, rank, folder)


def trained_by_halves(start, rank, folder):
    data, settings = halves(rank), config(**STARTS[start])
    base = sharded_llama(units=start != "eva")
    before = logits(base, data)
    model = get_peft_model(base, settings, calibration=data)
    found = {"start": products(model), "step 0": gap({0: logits(model, data)}, {0: before})}
    train(model, data)
    found["trained"], after = products(model), logits(model, data)
    if start != "dora":  # its trained biases are sharded
        with model.disable_adapter():
            found["disabled"] = gap({0: logits(model, data)}, {0: before})
    model.save_pretrained(f"{folder}/{start}")
    found["state"] = get_model_state_dict(model, options=FULL)
    # Another start takes the checkpoint over: whole on rank 0, or in parts from files.
    other = get_peft_model(sharded_llama(), settings, calibration=data, seed=1)
    state = dict(found["state"]) if rank == 0 else {}
    set_model_state_dict(other, state, options=FROM_RANK_0)
    found["loaded"] = gap({0: logits(other, data)}, {0: after})
    parts = get_model_state_dict(model)
    checkpoint.save(parts, checkpoint_id=f"{folder}/{start}/parts")
    other = get_peft_model(sharded_llama(), settings, calibration=data, seed=1)
    parts = get_model_state_dict(other)
    checkpoint.load(parts, checkpoint_id=f"{folder}/{start}/parts")
    set_model_state_dict(other, parts)
    found["loaded in parts"] = gap({0: logits(other, data)}, {0: after})
    distributed.barrier()
    other = LoraModel.from_pretrained(sharded_llama(), f"{folder}/{start}").eval()
    found["from file"] = gap({0: logits(other, data)}, {0: after})
    return found


def in_own_units(data):
    """Each target a unit, before the first forward pass of the base."""
    base = llama()
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in base.modules():
        if isinstance(module, torch.nn.Linear):
            fully_shard(module, mesh=mesh)
    model = get_peft_model(fully_shard(base, mesh=mesh), config(init_lora_weights="pissa"))
    report = model.init_report().to_dict()
    before = logits(train(model, data), data)
    base = model.unload()
    again = get_peft_model(base, config(init_lora_weights="pissa"))
    return {
        "trained": before,
        "unloaded": logits(base, data) if again.unload() is base else None,
        "report": [row["relative_norm"] for row in report["layers"]],
        "flags": [each.requires_grad for each in base.parameters()],
    }


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return ran(FEW, tmp_path_factory)


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return ran(STARTS.keys() - FEW, tmp_path_factory)


def ran(starts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fully_sharded")
    run_ranks(partial(work, starts=sorted(starts)), folder, WORLD)
    return folder, findings(folder)


@pytest.fixture
def ranks(request, start):
    """The folder and the findings of the processes that ran this start."""
    return request.getfixturevalue("few" if start in FEW else "rest")


@pytest.mark.parametrize("start", chosen(STARTS, *FEW))
def test_two_ranks_are_one_process(ranks, start):
    folder, found = ranks
    model = get_peft_model(llama(), config(**STARTS[start]), calibration=batches())
    first = products(model)
    trained = products(train(model, batches()))
    assert gap(first, trained) > 1e-3
    for one in (rank[start] for rank in found):
        assert gap(one["start"], first) <= 1e-6
        assert gap(one["trained"], trained) <= 1e-6
        assert one.get("disabled", 0.0) <= 1e-6
        if start != "lora_xs":  # it changes the output
            assert one["step 0"] <= 1e-6
    fresh = LoraModel.from_pretrained(llama(), folder / start)
    expected = model(**batches()[0]).logits
    torch.testing.assert_close(fresh.eval()(**batches()[0]).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", chosen(STARTS, *FEW))
def test_checkpoints_of_sharded_models(ranks, start):
    _, found = ranks
    model = get_peft_model(llama(), config(**STARTS[start]), calibration=batches())
    expected = set(model.state_dict())
    assert found[0][start]["state"].keys() == expected
    for one in (rank[start] for rank in found):
        for way in ("loaded", "loaded in parts", "from file"):
            assert one[way] <= 1e-6, way


def test_each_target_is_a_unit(few):
    model = get_peft_model(llama(), config(init_lora_weights="pissa"))
    report = model.init_report().to_dict()["layers"]
    train(model, batches())
    for rank, one in enumerate(rank["own units"] for rank in few[1]):
        trained, plain = logits(model, halves(rank)), logits(llama(), halves(rank))
        torch.testing.assert_close(one["trained"], trained, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one["unloaded"], plain)
        assert all(one["flags"])
        assert one["report"] == pytest.approx([row["relative_norm"] for row in report], rel=1e-6)
