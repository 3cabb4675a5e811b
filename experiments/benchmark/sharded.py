"""Starts of adapters on a base that FSDP2 has sharded: peak memory of a rank, and time by ranks.

The model is a stack of equal linear layers, each a unit. Ranks are processes of one machine that
communicate through gloo, so the times show how the work is shared, not a fast network. Memory and
time are measured in separate processes, because `ALLOCATOR` costs time.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from lora_init import LoraConfig, get_peft_model

from .peaks import ALLOCATOR, MIB, HostPeak
from .row import Case, Row
from .schema import BenchmarkConfig

TITLE = "Sharded bases"


def cases(settings: BenchmarkConfig) -> Iterator[Case]:
    shape = settings.sharded
    name = f"{shape.layers} layers of {4 * shape.width**2 / MIB:.3g} MiB"
    for method in shape.methods:
        yield Case("sharded", name, method, partial(measure, settings, name, method))


def measure(settings: BenchmarkConfig, name: str, method: str) -> Iterator[Row]:
    """The largest rise of a rank, and the time of the slowest rank.

    One process holds the base whole, so its rise is that of the factors and the work space.
    Several ranks may need a gathered layer in addition.
    """
    alone = highest(in_ranks(settings, method, 1, ALLOCATOR))
    for world in settings.sharded.ranks:
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        found = in_ranks(settings, method, world, ALLOCATOR) if world > 1 else None
        yield Row(
            "sharded", name, f"{method}, {ranks}: memory", settings.rank, "MiB",
            ours=alone if found is None else highest(found),
            planned=None if found is None else alone + 4 * settings.sharded.width**2 / MIB,
            note="; ".join({rank["note"] for rank in found or () if rank["note"]}),
        )  # fmt: skip
        found = in_ranks(settings, method, world, {})
        seconds = max(rank["seconds"] for rank in found)
        yield Row("sharded", name, f"{method}, {ranks}: time", settings.rank, "s", ours=seconds)


def highest(found: list[dict[str, Any]]) -> float:
    """The largest rise of a rank, in MiB."""
    return max(rank["rise"] for rank in found)


def in_ranks(
    settings: BenchmarkConfig, method: str, world: int, variables: dict[str, str]
) -> list[dict[str, Any]]:
    """Return the figures of each rank, from fresh processes with these environment variables."""
    before = dict(os.environ)
    os.environ.update(variables)  # read when a process starts
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(world, multiprocessing.get_context("spawn")) as pool,
        ):
            start = partial(start_of_rank, settings, method, world, f"file://{folder}/store")
            return list(pool.map(start, range(world)))
    finally:
        os.environ.clear()
        os.environ.update(before)


def start_of_rank(
    settings: BenchmarkConfig, method: str, world: int, store: str, rank: int
) -> dict[str, Any]:
    """Start an adapter as one rank."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    shape = settings.sharded
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, init_lora_weights=method,
                        target_modules="all-linear")  # fmt: skip
    # A first call loads code. Each rank computes a layer, large enough for the same algorithm.
    get_peft_model(sharded_stack(world, 512, settings.seed), config, cache=False)
    model = sharded_stack(shape.layers, shape.width, settings.seed)
    distributed.barrier()
    watch, begin = HostPeak(), time.perf_counter()
    get_peft_model(model, config, cache=False)
    seconds, rise = time.perf_counter() - begin, watch.rise()
    distributed.barrier()
    distributed.destroy_process_group()
    return {"rise": rise / MIB, "seconds": seconds, "note": watch.note}


def sharded_stack(layers: int, width: int, seed: int) -> nn.Module:
    """A stack of linear layers with random weights, each of which is a unit of FSDP2."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    torch.manual_seed(seed)
    model = nn.Sequential()
    for _ in range(layers):
        model.append(fully_shard(nn.Linear(width, width, bias=False), mesh=mesh))
    return fully_shard(model, mesh=mesh)
