"""Weight -> PiSSA's factors at s = 1, by every contender: B = U sqrt(S), A = sqrt(S) Vᵀ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.registry import resolve

LOWRANK, NITER, PISSA = "torch.svd_lowrank", "pissa_niter_N", "pissa"


@dataclass(frozen=True)
class Pair:
    """The two factors of one decomposition."""

    lora_A: Float[Tensor, "rank in"]
    lora_B: Float[Tensor, "out rank"]


@dataclass(frozen=True)
class Triplets:
    """All of a matrix, values descending."""

    left: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "in k"]

    def leading(self, rank: int) -> Pair:
        return paired(self.left[:, :rank], self.values[:rank], self.right[:, :rank])


def paired(left: Tensor, values: Tensor, right: Tensor) -> Pair:
    root = values.sqrt()
    return Pair(root[:, None] * right.T, left * root)


def exact(weight: Float[Tensor, "out in"]) -> Triplets:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return Triplets(left, values, right.T)


def by_lowrank(weight: Float[Tensor, "out in"], rank: int, niter: int, seed: int) -> Pair:
    """As the paper's code and PEFT call it: q = r, without oversampling."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return paired(*torch.svd_lowrank(weight, rank, niter=niter))


def by_niter(weight: Float[Tensor, "out in"], rank: int, niter: int, seed: int) -> Pair:
    return _registered(f"pissa_niter_{niter}", weight, rank, seed)


def by_pissa(weight: Float[Tensor, "out in"], rank: int, niter: int | None, seed: int) -> Pair:
    """To full quality; `niter` is not read."""
    return _registered("pissa", weight, rank, seed)


def _registered(name: str, weight: Tensor, rank: int, seed: int) -> Pair:
    initializer, options = resolve(name)
    generator = torch.Generator().manual_seed(seed)
    found = initializer.function(weight, rank, 1.0, None, options, generator)
    return Pair(found.lora_A, found.lora_B)


CONTENDERS = {LOWRANK: by_lowrank, NITER: by_niter, PISSA: by_pissa}
