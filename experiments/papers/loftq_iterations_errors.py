"""What a quantized layer with its adapter loses, and how far a whole model is from the original.

E = W - Q - s B A is what is left of a layer. The weight's error is ‖E‖_F / ‖W‖_F. The output's
error is sqrt(E‖E x‖² / E‖W x‖²) = sqrt(tr(E R Eᵀ) / tr(W R Wᵀ)), R the uncentered second moment
of the layer's real inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_init import Calibration
from lora_init.layers import LoraLayer
from lora_init.weights.kinds import oriented_weight

from ..measures.forgetting import token_divergence
from .corpus import language_batches
from .language import losses_of

BLOCKS_AT_ONCE = 4


@dataclass(frozen=True)
class ModelError:
    """Of one model against the original.

    Attributes:
        error: of an encoder, the relative error of its last hidden states; of a language model, KL
            in nats a token.
        texts: the same of each sentence, or of each block.
        losses: of a language model, nats a token, block by block; empty for an encoder.
    """

    error: float
    texts: tuple[float, ...] = ()
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
    """``‖H - H'‖_F / ‖H‖_F``, H the last hidden states of all tokens that are not padding."""

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
        self.batches = batches
        self.original = self._states(model)

    @torch.no_grad()
    def _states(self, model: nn.Module) -> list[Float[Tensor, "batch length width"]]:
        return [
            model(**batch, output_hidden_states=True).hidden_states[-1]
            * batch["attention_mask"][..., None]
            for batch in self.batches
        ]

    def __call__(self, model: nn.Module) -> ModelError:
        apart, whole = [], []
        for before, now in zip(self.original, self._states(model), strict=True):
            apart.append((now - before).square().sum((1, 2), dtype=torch.float64))
            whole.append(before.square().sum((1, 2), dtype=torch.float64))
        lost, there = torch.cat(apart), torch.cat(whole)
        return ModelError(
            float((lost.sum() / there.sum()).sqrt()), tuple((lost / there).sqrt().tolist())
        )


class NextTokens:
    """KL(original ‖ model) over the next token, and the loss, on blocks of tokens."""

    def __init__(self, model: nn.Module, blocks: Int[Tensor, "blocks length"]) -> None:
        self.batches = language_batches(blocks, BLOCKS_AT_ONCE)
        self.original = [self._logits(model, batch) for batch in self.batches]

    @staticmethod
    @torch.no_grad()
    def _logits(
        model: nn.Module, batch: dict[str, Tensor]
    ) -> Float[Tensor, "blocks length-1 words"]:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits[:, :-1].float()

    def __call__(self, model: nn.Module) -> ModelError:
        texts, losses = [], []
        for batch, before in zip(self.batches, self.original, strict=True):
            now = self._logits(model, batch)
            every = torch.ones(now.shape[:2], dtype=torch.bool, device=now.device)
            # All blocks have one length, so that the divergences come as rows of equal blocks.
            texts += token_divergence(before, now, every).view(now.shape[:2]).mean(1).tolist()
            losses += losses_of(now, batch["input_ids"]).tolist()
        return ModelError(sum(texts) / len(texts), tuple(texts), tuple(losses))


def base_error(layer: LoraLayer, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """W - Q, of a layer whose base is replaced."""
    return weight - oriented_weight(layer.base_layer).float()


@torch.no_grad()
def remaining(layer: LoraLayer, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """W - Q - s B A."""
    error = base_error(layer, weight)
    return error.addmm_(layer.lora_B, layer.lora_A, alpha=-layer.scaling)


def relative_norm(error: Float[Tensor, "out in"], weight: Float[Tensor, "out in"]) -> float:
    norms = [torch.linalg.vector_norm(m, dtype=torch.float64) for m in (error, weight)]
    return float(norms[0] / norms[1])


def mean_square_output(
    matrix: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"]
) -> float:
    """tr(M R Mᵀ): the mean of ‖M x‖² over the inputs."""
    return float(((matrix @ second_moment) * matrix).sum(dtype=torch.float64))


def second_moments(calibration: Calibration, names: list[str]) -> dict[str, Float[Tensor, "in in"]]:
    """In float32, one tensor for all layers that read the same inputs."""
    by_inputs: dict[int, Tensor] = {}
    found = {}
    for name in names:
        inputs = calibration.layers[name].inputs
        if id(inputs) not in by_inputs:
            by_inputs[id(inputs)] = inputs.second_moment.float()
        found[name] = by_inputs[id(inputs)]
    return found
