"""One training after another from one start: learnt and forgotten as it goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from experiments.errors import RunFailed
from experiments.measures.forgetting import token_divergence
from experiments.papers.fine_tuning import fine_tune
from experiments.papers.perplexity import block_losses, perplexity
from experiments.schedule import TrainingConfig
from lora_init import LoraModel


@dataclass(frozen=True)
class Held:
    """What is never trained on.

    Attributes:
        learnt: blocks of what is learnt.
        kept: blocks of what is to be kept.
        original: the original model's logits on `kept`, on the CPU.
        loss, perplexity: of the original model on either.
    """

    learnt: Int[Tensor, "blocks length"]
    kept: Int[Tensor, "some length"]
    original: Float[Tensor, "some length words"]
    loss: float
    perplexity: float


@torch.no_grad()
def hold(
    model: nn.Module,
    learnt: Int[Tensor, "blocks length"],
    kept: Int[Tensor, "some length"],
    batch_size: int,
) -> Held:
    """Measure the original model, which has no adapter yet."""
    home = next(model.parameters()).device
    logits = [model(input_ids=b.to(home)).logits.float().cpu() for b in kept.split(batch_size)]
    return Held(
        learnt,
        kept,
        torch.cat(logits),
        float(block_losses(model, learnt, batch_size).mean()),
        perplexity(block_losses(model, kept, batch_size)),
    )


@torch.no_grad()
def forgotten(model: nn.Module, held: Held, batch_size: int) -> tuple[float, float]:
    """KL(original ‖ model) in nats, a mean over positions; and the perplexity on `kept`."""
    home = next(model.parameters()).device
    divergences, losses = [], []
    for some, before in zip(
        held.kept.split(batch_size), held.original.split(batch_size), strict=True
    ):
        after = model(input_ids=some.to(home)).logits.float()
        mask = torch.ones_like(some, dtype=torch.bool, device=home)
        divergences.append(token_divergence(before, after, mask))
        found = nn.functional.cross_entropy(
            after[:, :-1].transpose(1, 2), some[:, 1:].to(home), reduction="none"
        )
        losses.append(found.double().mean(1).cpu())
    return max(float(torch.cat(divergences).mean()), 0.0), perplexity(torch.cat(losses))


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
    rows = [{"step": 0, "fall": 0.0, "divergence": 0.0, "perplexity": held.perplexity}]

    def observe(step: int) -> None:
        if step not in measured_steps:
            return
        was_training = model.training
        model.eval()
        loss = float(block_losses(model, held.learnt, size).mean())
        divergence, kept = forgotten(model, held, size)
        model.train(was_training)
        row = {"step": step, "fall": held.loss - loss, "divergence": divergence, "perplexity": kept}
        if all(map(math.isfinite, row.values())):
            rows.append(row)

    try:
        fine_tune(model, blocks, training, seed=seed, device=device, observe=observe)
    except RunFailed as error:
        if error.reason != "diverged":
            raise
    return rows


@contextmanager
def started_again(model: LoraModel) -> Iterator[None]:
    """Afterwards the adapter is what it was before, and the base with it."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(state)
