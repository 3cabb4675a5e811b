"""A device without enough memory initializes less at a time, or leaves layers to the CPU."""

import copy
import warnings

import pytest
import torch
from simulated_device import simulated_cuda
from torch import nn

from lora_init import LoraConfig, get_peft_model, linalg


@pytest.fixture
def base():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(24, 24) for _ in range(5)))


def product(layer):
    return layer.scaling * (layer.lora_B @ layer.lora_A).detach()


def started(base, device=None):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    return get_peft_model(copy.deepcopy(base), config, device=device, cache=False)


class Memory:
    """Refuses decompositions of more than `limit` matrices on the simulated device."""

    def __init__(self, limit):
        self.limit, self.sizes, self.decompose = limit, [], linalg.top_singular

    def __call__(self, matrix, *arguments, **settings):
        size = len(matrix) if matrix.ndim > 2 else 1
        if matrix.device.type == "cuda":
            if size > self.limit:
                raise torch.OutOfMemoryError("simulated")
            self.sizes.append(size)
        return self.decompose(matrix, *arguments, **settings)


@pytest.mark.parametrize("limit", [5, 2, 1, 0])
def test_factors_are_the_same_with_less_memory(base, limit, monkeypatch):
    expected = started(base)
    memory = Memory(limit)
    monkeypatch.setattr(linalg, "top_singular", memory)
    with simulated_cuda(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = started(base, device="cuda")
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for name, layer in model.layers.items():
        other = expected.layers[name]
        torch.testing.assert_close(product(layer), product(other), rtol=0, atol=1e-6)
    assert sum(memory.sizes) == (5 if limit else 0)
    said = [str(one.message) for one in caught if "too little free memory" in str(one.message)]
    assert bool(said) == (limit == 0)


def test_the_cpus_own_lack_of_memory_is_an_error(base, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(linalg, "top_singular", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        started(base)
