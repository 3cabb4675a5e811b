"""A weight plus or minus s B A: where it is written, and the bits that come out either way."""

import copy

import numpy as np
import pytest
import torch
from measures import EPSILON, assert_gap
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.dlpack import to_dlpack
from transformers.pytorch_utils import Conv1D

from lora_init import LoraConfig, get_peft_model
from lora_init.factors import low_rank_product
from lora_init.injection.editing import add_product
from lora_init.injection.exclusive import is_exclusive
from lora_init.linalg import matrix
from lora_init.weights.kinds import oriented_weight

SCALING = 1.5


def shared_through_numpy(module, tmp_path):
    return module.weight.detach().numpy()


def made_by_numpy(module, tmp_path):
    array = np.ones((8, 6), np.float32)
    module.weight = nn.Parameter(torch.from_numpy(array))
    return array


def shown_by_a_state_dict(module, tmp_path):
    return module.state_dict()


def assigned_to_another_model(module, tmp_path):
    other = nn.Linear(6, 8, device="meta")
    other.load_state_dict(module.state_dict(), assign=True)
    return other


def part_of_a_larger_block(module, tmp_path):
    block = torch.zeros(2, 8, 6)
    module.weight = nn.Parameter(block[0])


def mapped_from_safetensors(module, tmp_path):
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    module.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)


def mapped_from_a_checkpoint(module, tmp_path):
    torch.save(module.state_dict(), tmp_path / "model.pt")
    module.load_state_dict(torch.load(tmp_path / "model.pt", mmap=True), assign=True)


def mapped_from_a_file(module, tmp_path):
    module.weight.detach().numpy().tofile(tmp_path / "weight.bin")
    name = str(tmp_path / "weight.bin")
    weight = torch.from_file(name, shared=True, size=48, dtype=torch.float32).view(8, 6)
    module.weight = nn.Parameter(weight)


def shared_by_processes(module, tmp_path):
    module.share_memory()


def exported(module, tmp_path):
    module.requires_grad_(False)
    return to_dlpack(module.weight)


def kept_by_a_graph(module, tmp_path):
    return module(torch.ones(2, 6, requires_grad=True))


def made_for_inference(module, tmp_path):
    with torch.inference_mode():
        module.weight = nn.Parameter(torch.ones(8, 6), requires_grad=False)


OTHERS = [
    shared_through_numpy,
    made_by_numpy,
    shown_by_a_state_dict,
    assigned_to_another_model,
    part_of_a_larger_block,
    mapped_from_safetensors,
    mapped_from_a_checkpoint,
    mapped_from_a_file,
    shared_by_processes,
    exported,
    kept_by_a_graph,
    made_for_inference,
]


def factors(rows, columns, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, columns, generator=generator),
        torch.randn(rows, rank, generator=generator),
    )


@pytest.mark.parametrize("held", OTHERS, ids=lambda function: function.__name__)
def test_memory_that_others_see_is_not_written_to(held, tmp_path):
    module = nn.Linear(6, 8)
    other = held(module, tmp_path)
    assert not is_exclusive(module.weight)
    address, before = module.weight.data_ptr(), module.weight.detach().clone()
    still = torch.as_strided(module.weight.detach(), (8, 6), (6, 1))
    lora_A, lora_B = factors(8, 6)
    add_product(module, lora_A, lora_B, SCALING, -1)
    assert module.weight.data_ptr() != address
    assert torch.equal(still, before)
    assert torch.equal(module.weight, before - low_rank_product(lora_A, lora_B, SCALING))
    del other


def linear(rows, columns):
    return nn.Linear(columns, rows)


def conv1d(rows, columns):
    return Conv1D(rows, columns)


def conv2d(rows, columns):
    return nn.Conv2d(columns, rows, 1)


def channels_last(rows, columns):
    return nn.Conv2d(columns // 6, rows, (2, 3)).to(memory_format=torch.channels_last)


def embedding(rows, columns):
    return nn.Embedding(columns, rows)


@pytest.mark.parametrize("kind", [linear, conv1d, conv2d, channels_last, embedding])
@pytest.mark.parametrize("together", [7, 1 << 20], ids=["in parts", "at once"])
def test_both_ways_give_the_same_bits_and_lead_back(kind, together, monkeypatch):
    monkeypatch.setattr(matrix, "TOGETHER", together * 30)
    mine = kind(50, 30)
    watched = copy.deepcopy(mine)
    before = oriented_weight(mine).clone()
    lora_A, lora_B = factors(50, 30, rank=5)
    for sign in (-1, 1):
        kept = watched.state_dict()
        add_product(mine, lora_A, lora_B, SCALING, sign)
        add_product(watched, lora_A, lora_B, SCALING, sign)
        assert torch.equal(mine.weight, watched.weight)
        if sign == -1:
            expected = before.double() - SCALING * lora_B.double() @ lora_A.double()
            assert_gap(oriented_weight(mine), expected, 3 * EPSILON[torch.float32])
    assert_gap(oriented_weight(mine), before, 10 * EPSILON[torch.float32])
    del kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype, adapter_dtype):
    module = nn.Linear(6, 8, dtype=dtype)
    before = module.weight.detach().double()
    lora_A, lora_B = (factor.to(adapter_dtype) for factor in factors(8, 6))
    add_product(module, lora_A, lora_B, SCALING, 1)
    assert module.weight.dtype == dtype
    expected = before + SCALING * lora_B.double() @ lora_A.double()
    assert_gap(module.weight, expected, 3 * EPSILON.get(dtype, EPSILON[torch.float32]))


@pytest.mark.parametrize("part", [0, 3, 7])
def test_a_signal_right_after_an_addition_is_undone_too(part, monkeypatch):
    monkeypatch.setattr(matrix, "TOGETHER", 7 * 30)
    module = nn.Linear(30, 50)
    before, calls, add = module.weight.detach().clone(), [], torch.Tensor.add_

    def interrupted(tensor, *args, **kwargs):
        result = add(tensor, *args, **kwargs)
        calls.append(tensor)
        if len(calls) == part + 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(torch.Tensor, "add_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add_product(module, *factors(50, 30), SCALING, -1)
    assert_gap(module.weight, before, 10 * EPSILON[torch.float32])


def test_an_injected_model_keeps_its_memory_and_a_state_dict_its_numbers():
    base = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 10))
    config = LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights="pissa")
    addresses = [base[index].weight.data_ptr() for index in (0, 2)]
    model = get_peft_model(base, config)
    layers = model.layers.values()
    assert [layer.base_layer.weight.data_ptr() for layer in layers] == addresses
    base = model.unload()
    assert [base[index].weight.data_ptr() for index in (0, 2)] == addresses
    state = base.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    get_peft_model(base, config)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
