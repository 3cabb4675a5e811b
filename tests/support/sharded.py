"""Small runs of an adapter on several ranks, to be compared with one process."""

import os
from datetime import timedelta

import torch
from models import token_batches
from torch import distributed

from lora_init import LoraConfig
from lora_init.weights.sharded import whole

WORLD = 2
STEPS = 3
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def config(**settings):
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **settings)


def batches():
    found = token_batches(count=4, size=4, padded=False)
    return [one | {"labels": one["input_ids"]} for one in found]


def halves(rank):
    """This rank's rows of every batch. The mean of the halves' mean losses is the whole one's."""
    return [{name: value.chunk(WORLD)[rank] for name, value in each.items()} for each in batches()]


def join(rank, folder, world=WORLD):
    torch.set_num_threads(1)
    os.environ["LORA_INIT_CACHE"] = "off"
    # DeepSpeed and transformers read these, but the group meets at the file.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=300),
    )  # fmt: skip


def leave(found, rank, folder):
    """Hand the findings to the parent."""
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def findings(folder, world=WORLD):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def products(model):
    """s B A of every layer, with a core s B R A."""
    found = {}
    for name, layer in model.layers.items():
        lora_B = whole(layer.lora_B).double()
        if layer.lora_core is not None:
            lora_B = lora_B @ whole(layer.lora_core).double()
        found[name] = layer.scaling * (lora_B @ whole(layer.lora_A).double())
    return found


def sgd(model):
    trained = [each for each in model.parameters() if each.requires_grad]
    return torch.optim.SGD(trained, lr=0.02, momentum=0.9)


def train(model, data):
    optimizer = sgd(model)
    model.train()
    for batch in data[:STEPS]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return model


@torch.no_grad()
def logits(model, data):
    return model(**data[0]).logits


def gap(first, second):
    """The largest relative difference of two dicts of tensors; zeros must be equal."""
    assert first.keys() == second.keys()
    return max(float((first[n] - v).norm() / (v.norm() or 1.0)) for n, v in second.items())
