"""One training after another from one start: learned and forgotten as it goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lora_init import LoraModel
from lora_init.weights.fingerprint import fingerprint
from lora_init.weights.kinds import oriented_weight

from ...config.training import TrainingConfig
from ...errors import RunFailed
from ..fine_tuning import fine_tune
from ..language import block_losses
from .tradeoff import means


@dataclass(frozen=True)
class Held:
    """What is never trained on.

    Attributes:
        learned: blocks of what is learned.
        kept: blocks of what is to be kept.
        original: the original model's log-probabilities of the next token on `kept`, on the CPU.
        loss: of the original model on `learned`, nats a token.
        losses: of the original model on each block of `kept`.
    """

    learned: Int[Tensor, "blocks length"]
    kept: Int[Tensor, "some length"]
    original: Float[Tensor, "some length words"]
    loss: float
    losses: Float[np.ndarray, " some"]


@torch.no_grad()
def hold(
    model: nn.Module,
    learned: Int[Tensor, "blocks length"],
    kept: Int[Tensor, "some length"],
    batch_size: int,
) -> Held:
    """Measure the original model, which has no adapter yet."""
    home = next(model.parameters()).device
    logarithms, losses = [], []
    for some in kept.split(batch_size):
        logits = model(input_ids=some.to(home), use_cache=False).logits.float()
        losses.append(losses_of(logits, some.to(home)))
        logarithms.append(logits.log_softmax(-1).cpu())
    return Held(
        learned,
        kept,
        torch.cat(logarithms),
        float(block_losses(model, learned, batch_size).mean()),
        np.concatenate(losses),
    )


@torch.no_grad()
def forgotten(
    model: nn.Module, held: Held, batch_size: int
) -> tuple[Float[np.ndarray, " some"], Float[np.ndarray, " some"]]:
    """For each block of `kept`: KL(original ‖ model), a mean over positions, and the loss of the
    next token; nats."""
    home = next(model.parameters()).device
    divergences, losses = [], []
    for some, before in zip(
        held.kept.split(batch_size), held.original.split(batch_size), strict=True
    ):
        logits = model(input_ids=some.to(home), use_cache=False).logits.float()
        losses.append(losses_of(logits, some.to(home)))
        found = divergence_of(before.to(home), logits)
        divergences.append(found.double().mean(1).clamp_min(0).cpu().numpy())
    return np.concatenate(divergences), np.concatenate(losses)


def losses_of(
    logits: Float[Tensor, "some length words"], blocks: Int[Tensor, "some length"]
) -> Float[np.ndarray, " some"]:
    """The mean loss of each block's tokens, the first one given."""
    found = F.cross_entropy(logits[:, :-1].transpose(1, 2), blocks[:, 1:], reduction="none")
    return found.double().mean(1).cpu().numpy()


def divergence_of(
    before: Float[Tensor, "some length words"], logits: Float[Tensor, "some length words"]
) -> Float[Tensor, "some length"]:
    """KL(p ‖ q) at each position, `before` log p and `logits` log q up to a constant of each.

    With d = logits - before, KL = log E_p exp(d - E_p d): what rounding leaves is relative to KL
    and not to the entropies, so that float32 serves, at a third of the time of float64.
    """
    p = before.exp()
    p /= p.sum(-1, keepdim=True)
    change = logits - before
    change -= (p * change).sum(-1, keepdim=True)
    return (p * change.exp_()).sum(-1).log()


def trajectory(
    model: LoraModel,
    blocks: Int[Tensor, "blocks length"],
    training: TrainingConfig,
    held: Held,
    measured_steps: Sequence[int],
    *,
    seed: int,
    device: str,
) -> list[dict]:
    """Train from where the model is; rows at step 0 and at the measured steps.

    A training that diverges ends there, and its rows so far are what it has to show.
    """
    size = training.batch_size * 2
    unchanged = np.zeros_like(held.losses)
    rows = [point(0, 0.0, unchanged, held.losses)]

    def observe(step: int) -> None:
        if step not in measured_steps:
            return
        was_training = model.training
        model.eval()
        loss = float(block_losses(model, held.learned, size).mean())
        row = point(step, held.loss - loss, *forgotten(model, held, size))
        model.train(was_training)
        if all(math.isfinite(row[name]) for name in ("fall", "divergence", "perplexity")):
            rows.append(row)

    try:
        fine_tune(model, blocks, training, seed=seed, device=device, observe=observe)
    except RunFailed as error:
        if error.reason != "diverged":
            raise
    return rows


def point(
    step: int,
    fall: float,
    divergences: Float[np.ndarray, " some"],
    losses: Float[np.ndarray, " some"],
) -> dict:
    row = {"step": step, "fall": fall, **means(divergences, losses)}
    return row | {"divergences": divergences, "losses": losses}


@contextmanager
def started_again(model: LoraModel) -> Iterator[None]:
    """Afterwards the adapter is what it was before.

    Only what is trained is held meanwhile: the base is frozen, four times as large and more. A
    start that edits it was made from that edited base, so that the samples of the adapted weights
    by which the library tells one base from another must be the same before and after.

    Raises:
        RuntimeError: a base weight has changed.
    """
    trained = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    before = base_fingerprints(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in trained.items():
                parameter.copy_(value)
    for name, found in base_fingerprints(model).items():
        if found != before[name]:
            raise RuntimeError(f"{name}: its frozen base weight changed during a training")


def base_fingerprints(model: LoraModel) -> dict[str, str]:
    return {
        name: fingerprint(oriented_weight(layer.base_layer).detach())
        for name, layer in model.layers.items()
    }
