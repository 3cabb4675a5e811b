"""Operations whose answer depends on where tensors are.

Each function takes a tensor on the GPU `g` and one on the CPU `c`, both of three float32 numbers.
The simulated device must raise where a real one does, and put results where a real one does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

GPU = "cuda"
Operation = Callable[[Tensor, Tensor], Any]


def cpu_generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def trained(optimizer: type, **settings: Any) -> Tensor:
    layer = nn.Linear(3, 2).to(GPU)
    layer(torch.ones(4, 3, device=GPU)).sum().backward()
    optimizer(layer.parameters(), lr=0.1, **settings).step()
    return layer.weight


def two_devices() -> Tensor:
    parts = model()
    parts[0].to(GPU)
    parts[1](parts[0](torch.ones(4, 3, device=GPU)).cpu()).sum().backward()
    return parts[0].weight.grad


def moved_parameters() -> bool:
    parts = model()
    before = list(parts.parameters())
    parts.to(GPU)
    return all(a is b for a, b in zip(before, parts.parameters(), strict=True))


def with_default_device(make: Callable[[], Any]) -> Any:
    with torch.device(GPU):
        return make()


def assigned_data(g: Tensor, c: Tensor) -> Tensor:
    parameter = nn.Parameter(c.clone())
    parameter.data = g
    return parameter


def written(g: Tensor, c: Tensor) -> Tensor:
    result = g.clone()
    result[1:] = c[1:]
    return result


MAKING: dict[str, Operation] = {
    "zeros": lambda g, c: torch.zeros(2, device=GPU),
    "zeros_like": lambda g, c: torch.zeros_like(g),
    "zeros_like elsewhere": lambda g, c: torch.zeros_like(c, device=GPU),
    "new_zeros": lambda g, c: g.new_zeros(2),
    "new_tensor": lambda g, c: g.new_tensor([1.0]),
    "tensor": lambda g, c: torch.tensor([1.0], device=GPU),
    "as_tensor of numpy": lambda g, c: torch.as_tensor(np.ones(2, np.float32), device=GPU),
    "arange": lambda g, c: torch.arange(3, device=GPU),
    "eye": lambda g, c: torch.eye(3, device=GPU),
    "linspace": lambda g, c: torch.linspace(0, 1, 3, device=GPU),
    "empty strided": lambda g, c: torch.empty_strided((2, 2), (1, 2), device=GPU),
    "default device": lambda g, c: with_default_device(lambda: torch.zeros(2)),
    "default device, tensor": lambda g, c: with_default_device(lambda: torch.tensor([1.0])),
    "default device, module": lambda g, c: with_default_device(model)[0].weight,
    "default device, CPU generator": lambda g, c: with_default_device(
        lambda: torch.randn(2, generator=cpu_generator())
    ),
    "default device, randperm": lambda g, c: with_default_device(lambda: torch.randperm(4)),
}
DRAWING: dict[str, Operation] = {
    "randn": lambda g, c: torch.randn(2, device=GPU),
    "randn, CPU generator": lambda g, c: torch.randn(2, device=GPU, generator=cpu_generator()),
    "randn, its generator": lambda g, c: torch.randn(2, device=GPU, generator=torch.Generator(GPU)),
    "normal_, CPU generator": lambda g, c: g.clone().normal_(generator=cpu_generator()),
    "normal_": lambda g, c: g.clone().normal_(),
    "bernoulli": lambda g, c: torch.bernoulli(torch.full_like(g, 0.5)),
    "multinomial": lambda g, c: torch.multinomial(g.abs() + 1, 2),
    "dropout": lambda g, c: functional.dropout(g),
    "randint": lambda g, c: torch.randint(5, (2,), device=GPU),
    "rand_like": lambda g, c: torch.rand_like(g),
    "kaiming_uniform_": lambda g, c: nn.init.kaiming_uniform_(torch.empty(2, 2, device=GPU)),
}
MIXING: dict[str, Operation] = {
    "g + c": lambda g, c: g + c,
    "g + CPU scalar": lambda g, c: g + c.sum(),
    "c + GPU scalar": lambda g, c: c + g.sum(),
    "g * CPU vector of one": lambda g, c: g * c[:1],
    "g @ c": lambda g, c: g @ c,
    "outer": lambda g, c: torch.outer(g, c),
    "linear": lambda g, c: functional.linear(g, c.view(1, -1)),
    "addmm": lambda g, c: torch.addmm(g, torch.outer(g, g), torch.outer(c, c)),
    "where": lambda g, c: torch.where(g > 0, g, c),
    "where, CPU scalar": lambda g, c: torch.where(g > 0, g, c.sum()),
    "where, CPU condition": lambda g, c: torch.where(c > 0, g, g),
    "equal": lambda g, c: torch.equal(g, c),
    "allclose": lambda g, c: torch.allclose(g, c),
    "add_": lambda g, c: g.clone().add_(c),
    "add_ to the CPU": lambda g, c: c.clone().add_(g),
    "add_ a CPU scalar": lambda g, c: g.clone().add_(c.sum()),
    "add_ a GPU scalar to the CPU": lambda g, c: c.clone().add_(g.sum()),
    "mul_ of a CPU scalar by the GPU": lambda g, c: c.sum().mul_(g.sum()),
    "out on the CPU": lambda g, c: torch.add(g, g, out=c.clone()),
    "cat": lambda g, c: torch.cat([g, c]),
    "stack": lambda g, c: torch.stack([g, c]),
    "stack of scalars": lambda g, c: torch.stack([g.sum(), c.sum()]),
    "lerp": lambda g, c: torch.lerp(g, g, c),
    "clamp by CPU scalars": lambda g, c: g.clamp(c.min(), c.max()),
    "maximum": lambda g, c: torch.maximum(g, c),
    "bucketize": lambda g, c: torch.bucketize(g, c),
    "searchsorted": lambda g, c: torch.searchsorted(g, c),
    "_foreach_add": lambda g, c: torch._foreach_add([g, g], [c, c]),
    "_foreach_mul by a CPU scalar": lambda g, c: torch._foreach_mul([g, g], c.sum()),
    "embedding, CPU indices": lambda g, c: functional.embedding(c.long(), torch.outer(g, g)),
    "cross entropy": lambda g, c: functional.cross_entropy(torch.outer(g, g), c.long()),
    "promotion by a CPU float64 scalar": lambda g, c: (g * c.double().sum()).dtype,
}
INDEXING: dict[str, Operation] = {
    "g[CPU indices]": lambda g, c: g[torch.tensor([0, 1])],
    "c[GPU indices]": lambda g, c: c[torch.tensor([0, 1], device=GPU)],
    "g[CPU mask]": lambda g, c: g[c > 0],
    "c[GPU mask]": lambda g, c: c[g > 0],
    "g[CPU scalar]": lambda g, c: g[torch.tensor(1)],
    "g[mixed pair]": lambda g, c: torch.outer(g, g)[torch.tensor([0]), g[:1].long()],
    "index_select, CPU": lambda g, c: g.index_select(0, torch.tensor([0])),
    "gather, CPU": lambda g, c: g.gather(0, torch.tensor([0])),
    "scatter, CPU": lambda g, c: g.scatter(0, torch.tensor([0]), 1.0),
    "index_add, CPU": lambda g, c: g.index_add(0, torch.tensor([0]), g[:1]),
    "masked_fill, CPU mask": lambda g, c: g.masked_fill(c > 0, 0.0),
    "masked_fill, GPU scalar": lambda g, c: g.masked_fill(g > 0, g.sum()),
    "take, CPU": lambda g, c: g.take(torch.tensor([0])),
    "index_put_, CPU values": lambda g, c: g.clone().index_put_((g.long(),), c),
    "assigned slice": written,
    "assigned CPU scalar": lambda g, c: g.clone().index_fill_(0, g[:1].long(), c.sum()),
    "nonzero": lambda g, c: g.nonzero(),
    "repeat_interleave, CPU": lambda g, c: g.repeat_interleave(torch.tensor([1, 1, 2])),
}
LEAVING: dict[str, Operation] = {
    "numpy()": lambda g, c: g.numpy(),
    "np.asarray": lambda g, c: np.asarray(g),
    "numpy() after cpu()": lambda g, c: g.cpu().numpy().sum() > 0,
    "item": lambda g, c: g.sum().item() > 0,
    "tolist": lambda g, c: len(g.tolist()),
    "float": lambda g, c: float(g[0]) >= 0,
    "copy_ to the CPU": lambda g, c: c.clone().copy_(g),
    "copy_ from the CPU": lambda g, c: g.clone().copy_(c),
    "_foreach_copy_": lambda g, c: torch._foreach_copy_([g.clone()], [c]) and g,
    "data": assigned_data,
    "set_data of a leaf": lambda g, c: nn.Parameter(g).data,
    "deepcopy": lambda g, c: copy.deepcopy(g),
    "to(other)": lambda g, c: c.to(g),
    "to without a change": lambda g, c: g.to(GPU) is g,
    "to(cuda:0) without a change": lambda g, c: g.to("cuda:0") is g,
    "pin_memory of the CPU": lambda g, c: c.pin_memory().is_pinned(),
    "pin_memory of the GPU": lambda g, c: g.pin_memory(),
    "element_size": lambda g, c: g.element_size(),
    "share_memory_": lambda g, c: g.clone().share_memory_(),
}
DECOMPOSING: dict[str, Operation] = {
    "qr": lambda g, c: torch.linalg.qr(torch.outer(g, g))[0],
    "svd": lambda g, c: torch.linalg.svd(torch.outer(g, g))[0],
    "svd, driver": lambda g, c: torch.linalg.svd(torch.outer(g, g), driver="gesvd")[0],
    "eigh": lambda g, c: torch.linalg.eigh(torch.outer(g, g))[1],
    "cholesky_ex": lambda g, c: torch.linalg.cholesky_ex(torch.eye(3, device=GPU))[0],
    "solve_triangular": lambda g, c: torch.linalg.solve_triangular(
        torch.eye(3, device=GPU), g[:, None], upper=False
    ),
    "solve_triangular, mixed": lambda g, c: torch.linalg.solve_triangular(
        torch.eye(3), g[:, None], upper=False
    ),
    "lstsq": lambda g, c: torch.linalg.lstsq(torch.eye(3, device=GPU), g[:, None])[0],
    "lstsq, driver gelsd": lambda g, c: torch.linalg.lstsq(
        torch.eye(3, device=GPU), g[:, None], driver="gelsd"
    )[0],
    "half product": lambda g, c: torch.outer(g.half(), g.half()) @ g.half(),
    "half qr": lambda g, c: torch.linalg.qr(torch.outer(g, g).half()),
    "int8 product": lambda g, c: g.to(torch.int8) @ g.to(torch.int8),
    "float64 scalar": lambda g, c: (g.double() * 2).dtype,
}
TRAINING: dict[str, Operation] = {
    "SGD": lambda g, c: trained(torch.optim.SGD, momentum=0.9),
    "AdamW": lambda g, c: trained(torch.optim.AdamW),
    "AdamW, foreach": lambda g, c: trained(torch.optim.AdamW, foreach=True),
    "AdamW, fused": lambda g, c: trained(torch.optim.AdamW, fused=True),
    "two devices": lambda g, c: two_devices(),
    "the same parameters": lambda g, c: moved_parameters(),
    "module on the GPU, input on the CPU": lambda g, c: model().to(GPU)(c),
    "clip_grad_norm_": lambda g, c: nn.utils.clip_grad_norm_([], 1.0),
    "gradient on another device": lambda g, c: setattr(g.clone().requires_grad_(), "grad", c),
    "load_state_dict from the CPU": lambda g, c: (
        model().to(GPU).load_state_dict(model().state_dict()) is not None
    ),
}
OPERATIONS: dict[str, dict[str, Operation]] = {
    "making": MAKING,
    "drawing": DRAWING,
    "mixing": MIXING,
    "indexing": INDEXING,
    "leaving": LEAVING,
    "decomposing": DECOMPOSING,
    "training": TRAINING,
}
