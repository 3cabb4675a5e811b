"""How far a whole quantised model is from the original one, on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from experiments.papers.corpora import language_batches

BLOCKS_AT_ONCE = 4


@dataclass(frozen=True)
class ModelError:
    """Of one model against the original.

    Attributes:
        error: of an encoder, the relative error of its last hidden states; of a language model, KL
            in nats a token.
        losses: of a language model, nats a token, block by block; empty for an encoder.
    """

    error: float
    losses: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """NaN for an encoder."""
        if not self.losses:
            return float("nan")
        return float(torch.tensor(self.losses, dtype=torch.float64).mean().exp())


class Measure(Protocol):
    def __call__(self, model: nn.Module) -> ModelError: ...


class HiddenStates:
    """``‖H - H'‖_F / ‖H‖_F``, H the last hidden states of all tokens that are no padding."""

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
        self.batches = batches
        self.original = self._states(model)

    @torch.no_grad()
    def _states(self, model: nn.Module) -> list[Float[Tensor, "tokens width"]]:
        return [
            model(**batch, output_hidden_states=True).hidden_states[-1][
                batch["attention_mask"].bool()
            ]
            for batch in self.batches
        ]

    def __call__(self, model: nn.Module) -> ModelError:
        apart = whole = 0.0
        for before, now in zip(self.original, self._states(model), strict=True):
            apart += float((now - before).square().sum(dtype=torch.float64))
            whole += float(before.square().sum(dtype=torch.float64))
        return ModelError((apart / whole) ** 0.5)


class NextTokens:
    """KL(original ‖ model) over the next token, and the loss, on blocks of tokens."""

    def __init__(self, model: nn.Module, blocks: Int[Tensor, "blocks length"]) -> None:
        self.batches = language_batches(blocks, BLOCKS_AT_ONCE)
        self.original = [self._log_probabilities(model, batch) for batch in self.batches]

    @staticmethod
    @torch.no_grad()
    def _log_probabilities(
        model: nn.Module, batch: dict[str, Tensor]
    ) -> Float[Tensor, "blocks length-1 words"]:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits[:, :-1].float().log_softmax(-1)

    def __call__(self, model: nn.Module) -> ModelError:
        apart, losses, count = 0.0, [], 0
        for batch, before in zip(self.batches, self.original, strict=True):
            now = self._log_probabilities(model, batch)
            chosen = now.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
            losses += (-chosen.mean(dim=1)).tolist()
            count += chosen.numel()
            apart += float(functional.kl_div(now, before, log_target=True, reduction="sum"))
        return ModelError(apart / count, tuple(losses))

    def original_losses(self) -> ModelError:
        """The original model against itself."""
        losses = []
        for batch, before in zip(self.batches, self.original, strict=True):
            chosen = before.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
            losses += (-chosen.mean(dim=1)).tolist()
        return ModelError(0.0, tuple(losses))
