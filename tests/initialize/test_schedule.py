"""Layers on several cores, in stacks, and over the ranks of a process group."""

from __future__ import annotations

import threading

import pytest
import torch
from layers import layer_of, parts_of
from methods import SPECS, behavior
from products import thinned
from torch import nn

from lora_init import LoraConfig, get_peft_model
from lora_init.initialize import jobs
from lora_init.layer import stacked
from lora_init.linalg import bottom_singular, leading_qr, top_eigen, top_singular
from lora_init.linalg import cores as concurrency
from lora_init.linalg.moments import InputStatistics
from lora_init.linalg.precision import device_for
from lora_init.plan.make import make_plan

CPU = torch.device("cpu")


def plan_of(shapes: list[tuple[int, int]], method: str = "pissa", rank: int = 4):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(columns, rows) for rows, columns in shapes))
    names = [str(index) for index in range(len(shapes))]
    return make_plan(model, LoraConfig(r=rank, target_modules=names, init_lora_weights=method))


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_several_threads_give_the_factors_of_one(monkeypatch):
    """In one thread each, all together, and one after another."""
    found = []
    for pooled, alone, threads in ((0, 10**9, 3), (10**9, 0, 3), (0, 0, 1)):
        monkeypatch.setattr(concurrency, "POOLED", pooled)
        monkeypatch.setattr(concurrency, "ALONE", alone)
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(6)))
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
        adapted = get_peft_model(model, config, cache=False)
        found.append(torch.stack([layer.lora_A for layer in adapted.layers.values()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("three_threads")
def test_the_number_of_threads_is_left_alone():
    before = torch.get_num_threads()
    plan = plan_of([(8, 8)] * 3)
    planned = jobs.jobs(plan, dict.fromkeys((t.name for t in plan.targets), CPU))
    list(jobs.run(lambda job: job, planned))
    assert torch.get_num_threads() == before
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]


BATCHED = [(name, None) for name, spec in SPECS.items() if spec.is_batched]


@pytest.mark.parametrize(
    ("method", "niter", "shape"),
    thinned(
        [
            (*one, shape)
            for one in (*BATCHED, ("pissa", 2))
            for shape in ((40, 24), (24, 40), (300, 280))
        ],
        lambda method, niter, shape: (method, niter),
        lambda method, niter, shape: (behavior(method), shape),
        lambda method, niter, shape: niter and shape,
    ),
    ids=str,
)
def test_a_stack_gives_what_its_layers_give(method, niter, shape):
    """Within 1e-6 of ‖W‖ in the product: batched kernels round in another order."""
    spec = SPECS[method]
    options = spec.options(niter=niter) if niter is not None else spec.options()
    spectrum = torch.arange(1, min(shape) + 1) ** -0.7
    left, right = (torch.linalg.qr(torch.randn(3, n, min(shape)))[0] for n in shape)
    stack = (left * spectrum) @ right.mT

    parts = [{} for _ in stack]
    if spec.reads & {"inputs", "gradient"}:
        rows = torch.randn(3, 500, shape[1]) * torch.arange(1, shape[1] + 1) ** -0.5
        inputs = [InputStatistics.of_rows(some) for some in rows]
        inputs[1] = inputs[0]  # two layers that read one input
        request = spec.request(options)
        parts = [parts_of(request, *each) for each in zip(inputs, stack, strict=True)]
    layers = [
        layer_of(weight, 4, name=str(index), **parts[index]) for index, weight in enumerate(stack)
    ]
    together = spec.function(stacked(layers), options)
    for index, weight in enumerate(stack):
        alone = spec.function(layers[index], options)
        gap = together.lora_B[index] @ together.lora_A[index] - alone.lora_B @ alone.lora_A
        assert gap.norm() <= 1e-6 * weight.norm()


@pytest.mark.parametrize("rank", [3, 20])
@pytest.mark.parametrize("shape", [(50, 30), (30, 50), (320, 290)])
def test_decompositions_of_a_stack(shape, rank):
    torch.manual_seed(1)
    stack = torch.randn(2, 2, *shape, dtype=torch.float64)
    for decompose in (top_singular, bottom_singular):
        found = decompose(stack, rank)
        assert found.left.shape == (2, 2, shape[0], rank)
        assert found.right.shape == (2, 2, shape[1], rank)
        assert found.residual.shape == (2, 2)
        product = (found.left * found.values[..., None, :]) @ found.right.mT
        for index in ((0, 0), (1, 0)):
            left, values, right = torch.linalg.svd(stack[index], full_matrices=False)
            kept = slice(0, rank) if decompose is top_singular else slice(-rank, None)
            expected = (left[:, kept] * values[kept]) @ right[kept]
            excess = (stack[index] - product[index]).norm() / (stack[index] - expected).norm()
            assert abs(excess - 1) <= 1e-4
    moment = stack.mT @ stack
    values, vectors = top_eigen(moment, rank)
    residual = moment @ vectors - vectors * values[..., None, :]
    assert residual.norm(dim=-2).max() <= 1e-4 * values.max()
    basis, triangle = leading_qr(stack, rank)
    torch.testing.assert_close((basis @ triangle)[..., :rank], stack[..., :rank])


@pytest.mark.parametrize("present", [True, False])
def test_auto_is_the_accelerator_where_there_is_one(monkeypatch, present):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert device_for("auto") == (torch.device("cuda") if present else None)
