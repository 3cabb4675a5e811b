"""An adapter on a quantized base that two ranks share, compared with one process."""

from functools import partial

import pytest
import torch
from format_examples.packed_layers import COLUMNS, ROWS, quantized_layer
from packing import packed
from processes import run_ranks
from sharded import WORLD, findings, gap, join, leave, products
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lora_init import LoraConfig, get_peft_model

BITSANDBYTES = {"Linear4bit": "nf4", "Linear4bit double": "nf4 double"}
CASES = {
    **{(kind, "FSDP2"): "pissa" for kind in (
        "torchao nf4", "Linear4bit", "Linear4bit double", "HQQLinear", "HQQLinear axis 0",
        "QLinear", "QLinear float8", "GPTQ", "AWQ", "FP8Linear",
    )},
    ("torchao nf4", "FSDP2 eva"): "eva",
    ("torchao float8", "by outputs"): "pissa",
    ("torchao float8", "by inputs"): "pissa",
}  # fmt: skip


def network(kind):
    """A quantized layer between two float layers, with the same values in every process."""
    torch.manual_seed(0)
    if kind in BITSANDBYTES:
        (layer,) = packed(nn.Sequential(nn.Linear(COLUMNS, ROWS)), BITSANDBYTES[kind])
    else:
        layer, _ = quantized_layer(kind)
    if kind == "torchao float8":  # a DTensor of it has no product with a bias
        layer.bias = None
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, COLUMNS), layer, nn.Linear(ROWS, 4)).requires_grad_(False)


def batches():
    torch.manual_seed(2)
    return list(torch.randn(3, 8, 16))


def sharded_network(kind, how, rank):
    model, mesh = network(kind), init_device_mesh("cpu", (WORLD,))
    if how.startswith("FSDP2"):
        return fully_shard(model, mesh=mesh)
    # torchao's tensors are split before they become DTensors, as its own examples do.
    dim = 0 if how == "by outputs" else 1
    size = model[1].weight.shape[dim] // WORLD
    mine = slice(rank * size, (rank + 1) * size)
    part = model[1].weight[mine] if dim == 0 else model[1].weight[:, mine]
    whole = DTensor.from_local(part, mesh, [Shard(dim)], run_check=False)
    model[1].weight = nn.Parameter(whole, requires_grad=False)
    style = ColwiseParallel if dim == 0 else RowwiseParallel
    # The layer before it is split by its outputs if this one is split by its inputs, and so on.
    first, last = (None, RowwiseParallel()) if dim == 0 else (ColwiseParallel(), None)
    plan = {"0": first, "1": style(), "2": last}
    return parallelize_module(model, mesh, {name: one for name, one in plan.items() if one})


def adapted(base, start, data):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1"], init_lora_weights=start)
    return get_peft_model(base, config, calibration=data if start == "eva" else None)


def train(model, data):
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for x in data:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def work(rank, folder, cases):
    join(rank, folder)
    leave({case: in_parts(*case, rank) for case in cases}, rank, folder)


def in_parts(kind, how, rank):
    data = [x.chunk(WORLD)[rank] for x in batches()] if how.startswith("FSDP2") else batches()
    base = sharded_network(kind, how, rank)
    before = base(data[0]).detach()
    model = adapted(base, CASES[kind, how], data)
    found = {"start": products(model), "step 0": gap({0: model(data[0]).detach()}, {0: before})}
    found["trained"] = products(train(model, data))
    with model.disable_adapter():
        found["disabled"] = gap({0: model(data[0]).detach()}, {0: before})
    found["unloaded"] = model.unload() is base
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return ran(CASES, tmp_path_factory)


def ran(cases, tmp_path_factory):
    for kind, _ in cases:
        network(kind)  # skips here, not in a process, where its package is missing
    folder = tmp_path_factory.mktemp("quantized")
    run_ranks(partial(work, cases=cases), folder, WORLD)
    return findings(folder)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(ranks, case):
    kind, _ = case
    # EVA's statistics are sums over the ranks, in another order than in one process.
    tolerance = 1e-5 if CASES[case] == "eva" else 1e-6
    model = adapted(network(kind), CASES[case], batches())
    first = products(model)
    trained = products(train(model, batches()))
    assert gap(first, trained) > 1e-3
    for one in (rank[case] for rank in ranks):
        assert gap(one["start"], first) <= 1e-6
        assert gap(one["trained"], trained) <= tolerance
        assert one["step 0"] <= 1e-6
        assert one["disabled"] <= 1e-6
        assert one["unloaded"]
