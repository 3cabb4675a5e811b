"""What a stack of equal layers shares on an accelerator: draws, copies and reads."""

import copy
import warnings

import pytest
import torch
from simulated_device import CUDA, place, simulated_cuda
from torch import nn

from lora_init import LoraConfig, get_peft_model, list_initializers

DRAWN = [spec.name for spec in list_initializers() if not spec.needs]


def layers_of(*shapes):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(columns, rows, bias=False) for rows, columns in shapes))


def started(base, method, **settings):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=method)
    return get_peft_model(copy.deepcopy(base), config, cache=False, **settings)


@pytest.mark.parametrize("method", DRAWN)
def test_drawn_factors_of_a_stack_are_those_of_each_layer(method):
    base = layers_of((24, 24), (24, 24), (24, 24))
    expected = started(base, method)
    with simulated_cuda():
        model = started(base.cuda(), method)
        for name, layer in model.layers.items():
            for factor in ("lora_A", "lora_B"):
                found = getattr(layer, factor).detach()
                assert place(found) == CUDA
                assert found.is_contiguous()
                assert found.untyped_storage().nbytes() == found.nbytes, "its own memory"
                assert torch.equal(found.cpu(), getattr(expected.layers[name], factor))


@pytest.mark.parametrize("device", [None, "cuda"])
def test_a_layer_of_a_stack_that_is_not_finite_is_named(device):
    base = layers_of((24, 24), (24, 24), (24, 24))
    base[1].weight.data[3, 5] = torch.nan
    with simulated_cuda(), pytest.raises(ValueError, match=r"target '1': its weight holds NaN"):
        started(base, "pissa", device=device)


@pytest.mark.parametrize("device", [None, "cuda"])
def test_only_the_layer_whose_factors_vanish_is_named(device):
    base = layers_of((24, 24), (24, 24), (24, 24))
    base[1].weight.data.zero_()
    with simulated_cuda(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        started(base, "pissa", device=device)
    said = [str(one.message) for one in caught if "both factors zero" in str(one.message)]
    assert len(said) == 1
    assert "target '1'" in said[0]
