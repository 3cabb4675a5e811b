"""The tests' simulated device compared with this one: what raises, and where results are.

After a difference, tests without a GPU miss a fault or refuse what works. Differences are listed.
They do not count as wrong results of the library.
"""

from __future__ import annotations

import copy
import importlib.util
from contextlib import nullcontext
from pathlib import Path
from types import CodeType, ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .task import Task

SIMULATED = Path(__file__).resolve().parents[2] / "tests" / "support" / "simulated_device.py"
OPERATIONS = """
torch.zeros(2, device=GPU)
torch.zeros_like(c, device=GPU)
g.new_tensor([1.0])
torch.as_tensor(np.ones(2, np.float32), device=GPU)
by_default(lambda: torch.tensor([1.0]))
by_default(lambda: torch.randn(2, generator=torch.Generator()))
by_default(lambda: torch.randperm(4))
torch.randn(2, device=GPU, generator=torch.Generator())
torch.randn(2, device=GPU, generator=torch.Generator(GPU))
g.clone().normal_(generator=torch.Generator())
torch.bernoulli(torch.full_like(g, 0.5))
nn.init.kaiming_uniform_(torch.empty(2, 2, device=GPU))
g + c
g + c.sum()
c + g.sum()
g * c[:1]
g @ c
functional.linear(g, c.view(1, -1))
torch.addmm(g, torch.outer(g, g), torch.outer(c, c))
torch.where(g > 0, g, c)
torch.where(g > 0, g, c.sum())
torch.equal(g, c)
g.clone().add_(c)
c.clone().add_(g)
c.clone().add_(g.sum())
c.sum().mul_(g.sum())
torch.add(g, g, out=c.clone())
torch.cat([g, c])
torch.stack([g, c])
torch.stack([g.sum(), c.sum()])
g.clamp(c.min(), c.max())
torch._foreach_mul([g, g], c.sum())
functional.embedding(c.long(), torch.outer(g, g))
functional.cross_entropy(torch.outer(g, g), c.long())
(g * c.double().sum()).dtype
g[torch.tensor([0, 1])]
c[torch.tensor([0, 1], device=GPU)]
g[c > 0]
c[g > 0]
g[torch.tensor(1)]
torch.outer(g, g)[torch.tensor([0]), g[:1].long()]
g.index_select(0, torch.tensor([0]))
g.masked_fill(c > 0, 0.0)
g.masked_fill(g > 0, g.sum())
g.clone().index_put_((g.long(),), c)
g.clone().__setitem__(slice(1, None), c[1:])
g.clone().index_fill_(0, g[:1].long(), c.sum())
g.nonzero()
g.repeat_interleave(torch.tensor([1, 1, 2]))
g.numpy()
np.asarray(g)
type(g.cpu().numpy())
c.clone().copy_(g)
g.clone().copy_(c)
torch._foreach_copy_([g.clone()], [c]) and g
setattr(nn.Parameter(c.clone()), "data", g)
copy.deepcopy(g)
c.to(g)
g.to(GPU) is g
g.to("cuda:0") is g
c.pin_memory().is_pinned()
g.pin_memory()
torch.linalg.qr(torch.outer(g, g))[0]
torch.linalg.svd(torch.outer(g, g), driver="gesvd")[0]
torch.linalg.eigh(torch.outer(g, g))[1]
torch.linalg.cholesky_ex(torch.eye(3, device=GPU))[0]
torch.linalg.solve_triangular(torch.eye(3, device=GPU), g[:, None], upper=False)
torch.linalg.solve_triangular(torch.eye(3), g[:, None], upper=False)
torch.linalg.lstsq(torch.eye(3, device=GPU), g[:, None], driver="gelsd")[0]
torch.outer(g.half(), g.half()) @ g.half()
torch.linalg.qr(torch.outer(g, g).half())
g.to(torch.int8) @ g.to(torch.int8)
trained(torch.optim.SGD, momentum=0.9)
trained(torch.optim.AdamW, foreach=True)
trained(torch.optim.AdamW, fused=True)
network().to(GPU)(c)
setattr(g.clone().requires_grad_(), "grad", c)
network().to(GPU).load_state_dict(network().state_dict()) is not None
"""
"""Expressions of a tensor `g` on the GPU and a tensor `c` on the CPU, of three float32 numbers."""


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def by_default(make):
    """What `make` returns while the GPU is torch's default device."""
    with torch.device("cuda"):
        return make()


def trained(optimizer: type, **settings: object) -> Tensor:
    """A weight after one step of training on the GPU."""
    layer = nn.Linear(3, 2).to("cuda")
    layer(torch.ones(4, 3, device="cuda")).sum().backward()
    optimizer(layer.parameters(), lr=0.1, **settings).step()
    return layer.weight


NAMES = {
    "GPU": "cuda",
    "by_default": by_default,
    "copy": copy,
    "functional": functional,
    "network": network,
    "nn": nn,
    "np": np,
    "torch": torch,
    "trained": trained,
}


def run(task: Task) -> None:
    if not SIMULATED.exists():
        task.record.note(f"the comparison is missing: {SIMULATED.name} does not exist")
        return
    simulated = loaded(SIMULATED)
    if not task.cuda:
        task.record.note("no CUDA device: only the simulated device ran")
    operations = OPERATIONS.split("\n")[1:-1]
    different = 0
    for text in operations:
        code = compile(text, text, "eval")
        theirs = answer(code, simulated)
        ours = answer(code, None) if task.cuda else theirs
        if ours != theirs:
            different += 1
            task.record.row(text, device=ours, simulated=theirs)
    task.record.row("all operations", compared=len(operations), different=different)


def loaded(path: Path) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(code: CodeType, simulated: ModuleType | None) -> str:
    """The result's type, device, dtype and shape, or "raises"."""
    with nullcontext() if simulated is None else simulated.simulated_cuda():
        tensors = {"c": torch.arange(3.0), "g": torch.arange(3.0, device="cuda")}
        try:
            found = described(eval(code, NAMES | tensors))
            if simulated is None:
                torch.cuda.synchronize()  # kernels report errors late
            return found
        except Exception:  # a real device raises other types than the simulated one
            return "raises"


def described(result: object) -> str:
    """The result without its values: draws and decompositions differ."""
    if isinstance(result, list | tuple):
        return ", ".join(described(one) for one in result)
    if isinstance(result, Tensor):
        return f"{result.device.type} {str(result.dtype)[6:]} {tuple(result.shape)}"
    return str(result)
