"""Perplexity as more and more of the least components are dropped from every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_init.progress import tracked

from ..language import block_losses
from .projections import (
    Inputs,
    LeastComponents,
    least_components,
)


@torch.no_grad()
def losses_by_fraction(
    model: nn.Module,
    names: Sequence[str],
    method: str,
    inputs: Mapping[str, Inputs] | None,
    fractions: Sequence[float],
    blocks: Int[Tensor, "blocks length"],
    *,
    alpha: float,
    batch_size: int,
) -> dict[float, Float[Tensor, " blocks"]]:
    """The blocks' losses for each fraction of components dropped; the model is left as it was.

    One decomposition a layer serves all fractions: what a smaller one drops, a larger one drops,
    too.
    """
    ascending = sorted(fractions)
    found = {}
    with restored(model, names):
        components = decomposed(model, names, method, inputs, ascending[-1], alpha)
        before = 0.0
        for fraction in tracked(ascending, f"perplexity ({method})"):
            for name, least in components.items():
                weight = model.get_submodule(name).weight
                first, last = dropped(weight.shape, before), dropped(weight.shape, fraction)
                weight.sub_(least.product(first, last))
            found[fraction] = block_losses(model, blocks, batch_size)
            before = fraction
    return found


def decomposed(
    model: nn.Module,
    names: Sequence[str],
    method: str,
    inputs: Mapping[str, Inputs] | None,
    fraction: float,
    alpha: float,
) -> dict[str, LeastComponents]:
    """The least components of every layer; on a CPU a layer a core, where LAPACK scales poorly."""

    def work(name: str) -> LeastComponents:
        weight = model.get_submodule(name).weight.detach()
        known = None if inputs is None else inputs[name]
        return least_components(weight, method, known, dropped(weight.shape, fraction), alpha)

    threads = torch.get_num_threads()
    alone = next(model.parameters()).device.type != "cpu"
    with ThreadPoolExecutor(
        1 if alone else threads, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        try:
            done = zip(
                tracked(names, f"decomposing ({method})"), pool.map(work, names), strict=True
            )
            return dict(done)
        finally:
            # Threads to come take the number that was set last, by whichever thread.
            torch.set_num_threads(threads)


def dropped(shape: Sequence[int], fraction: float) -> int:
    """How many of the min(out, in) components a fraction is; a positive one drops at least one."""
    return max(round(fraction * min(shape)), int(fraction > 0))


@contextmanager
def restored(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Whatever happens inside, the weights are the same afterwards, to the bit."""
    kept = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                model.get_submodule(name).weight.copy_(weight)
