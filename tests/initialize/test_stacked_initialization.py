"""What a stack of equal layers shares on an accelerator: draws, copies and reads."""

import copy
import warnings

import pytest
import torch
from simulated_device import CUDA, place, simulated_cuda
from torch import nn

from lora_init import LoraConfig, get_peft_model, list_initializers
from lora_init.linalg import draws, transfer

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


def test_equal_blocks_are_drawn_once(monkeypatch):
    """All stacks of PiSSA begin with the same block and use the same noise."""
    monkeypatch.setattr("lora_init.initialize.jobs.STACK_BYTES", 2 * 4 * 320 * 300)
    monkeypatch.setattr("lora_init.linalg.dense.GRAM_DIMENSION", 0)
    base, drawn, normal = layers_of(*[(320, 300)] * 4), [], draws.normal

    def recorded(*shape, generator, dtype=torch.float32):
        drawn.append(shape)
        return normal(*shape, generator=generator, dtype=dtype)

    monkeypatch.setattr(draws, "normal", recorded)
    expected = started(base, "pissa")
    drawn.clear()
    with simulated_cuda():
        model = started(base.cuda(), "pissa")
    assert drawn == [(300, 20)] * 2
    for name, layer in model.layers.items():
        other = expected.layers[name]
        gap = (layer.lora_B @ layer.lora_A).cpu() - other.lora_B @ other.lora_A
        assert gap.norm() <= 1e-6 * base[0].weight.norm()


def test_blocks_are_kept_for_one_call_and_within_bounds():
    def draw(columns, seed=0):
        return draws.normal_block(5, columns, generator=torch.Generator().manual_seed(seed))

    assert draw(2) is not draw(2)
    with draws.shared_blocks():
        first, generator = draw(2), torch.Generator().manual_seed(0)
        assert draws.normal_block(5, 2, generator=generator) is first
        expected = torch.Generator().manual_seed(0)
        draws.normal(5, 2, generator=expected)
        assert torch.equal(generator.get_state(), expected.get_state())
        assert not torch.equal(draw(2, seed=1), first)
        for columns in range(3, 3 + draws.KEPT_BLOCKS):
            draw(columns)
        assert draw(2) is not first
        assert torch.equal(draw(2), first)


def test_numbers_are_read_in_their_own_types():
    numbers = [torch.tensor(True), torch.tensor(7), torch.tensor(0.1), torch.tensor([0.1, 2.0])]
    assert transfer.on_host(numbers) == [number.tolist() for number in numbers]
    assert [type(value) for value in transfer.on_host(numbers)] == [bool, int, float, list]


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
