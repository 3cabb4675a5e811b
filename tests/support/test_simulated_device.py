"""The simulated CUDA device itself: it refuses, serves and trains what the real one does."""

import copy

import numpy as np
import pytest
import scipy.linalg
import torch
from simulated_device import CPU, CUDA, PLACES, place
from torch import nn
from torch.nn import functional

REFUSED = {
    "sum": lambda g, c: g + c,
    "sum with a CUDA number": lambda g, c: c + g.sum(),
    "product": lambda g, c: g @ c,
    "linear": lambda g, c: functional.linear(g, c.view(1, -1)),
    "concatenation": lambda g, c: torch.cat([g, c]),
    "stack of a number": lambda g, c: torch.stack([g.sum(), c.sum()]),
    "choice": lambda g, c: torch.where(g > 0, g, c),
    "comparison": lambda g, c: torch.equal(g, c),
    "search": lambda g, c: torch.bucketize(g, c),
    "in place": lambda g, c: c.add_(g),
    "into a CPU number": lambda g, c: c.sum().add_(g.sum()),
    "selection": lambda g, c: g.index_select(0, c.long()),
    "assignment": lambda g, c: g.index_put_([torch.tensor([0, 1, 2])], c),
    "embedding": lambda g, c: functional.embedding(c.long(), torch.outer(g, g)),
    "CUDA index": lambda g, c: c[g > 0],
    "CPU generator": lambda g, c: torch.randn(3, device=g.device, generator=torch.Generator()),
    "CPU generator in place": lambda g, c: g.normal_(generator=torch.Generator()),
    "numpy": lambda g, c: g.numpy(),
    "numpy's own conversion": lambda g, c: np.asarray(g),
    "scipy": lambda g, c: scipy.linalg.eigh(torch.outer(g, g)),
}


@pytest.mark.parametrize("operation", REFUSED.values(), ids=REFUSED)
def test_the_simulation_refuses_what_cuda_refuses(cuda, operation):
    with pytest.raises((RuntimeError, TypeError), match="device"):
        operation(torch.ones(3).cuda(), torch.ones(3))
    operation(torch.ones(3), torch.ones(3))


def test_the_simulation_serves_what_cuda_serves(cuda):
    c, g = torch.arange(3.0), torch.arange(3.0, device="cuda")
    assert g.device == torch.device("cuda:0") == c.to(g).device
    assert g.is_cuda
    assert g.to("cuda") is g
    assert c.cpu() is c
    on_cuda = [
        c.cuda(), c.to("cuda", torch.float64), c.to(g), g + 1, g * c.sum(), g[1:], g[None].T,
        g[torch.tensor([0, 1])], g.new_zeros(2), torch.zeros_like(g), torch.ones_like(c, device=0),
        torch.tensor([1.0], device=g.device), torch.as_tensor(c, device="cuda"), torch.clone(g),
        torch.empty(0, device="cuda"), copy.deepcopy(g), g.clone().copy_(c), g.half(),
        torch.where(g > 0, g, 1.0), torch.randn(2, device="cuda", requires_grad=True),
    ]  # fmt: skip
    assert {place(tensor) for tensor in on_cuda} == {CUDA}
    assert on_cuda[-1].is_leaf
    at_home = [c, g.cpu(), g.to("cpu"), g.to(c), c.clone().copy_(g), g.new_zeros(2, device="cpu")]
    assert {place(tensor) for tensor in at_home} == {CPU}
    drawn = [torch.manual_seed(0) and torch.randn(3, device=where).cpu() for where in PLACES]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_simulation_trains(cuda, optimizer):
    """Across devices too; parameters stay the same objects when their module moves."""
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 3), nn.Linear(3, 2))
    parameters = list(model.parameters())
    model.cuda()
    model[2].cpu()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    hidden = model[1](model[0](torch.tensor([0, 1, 4], device="cuda")))
    before = hidden.clone()
    model[2](hidden.cpu()).cuda().pow(2).sum().backward()
    assert [place(parameter.grad) for parameter in parameters] == 3 * [CUDA] + 2 * [CPU]
    optimizer(parameters, lr=0.1).step()
    assert not torch.equal(model[1](model[0](torch.tensor([0, 1, 4], device="cuda"))), before)
    with pytest.raises(RuntimeError, match="same device"):
        model[2](hidden)
