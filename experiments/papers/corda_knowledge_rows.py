"""Trainings from every start: what they learn and forget as they go on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_init import Calibration, LoraConfig, LoraModel, calibrate, get_peft_model
from lora_init.injection import Injection

from ..config.training import TrainingConfig
from ..console import say
from ..errors import ConfigurationError, RunFailed
from .corda_knowledge_tradeoff import LABELS, means, winning_rates
from .corpus import joined_blocks, language_batches, load_texts
from .fine_tuning import constant_training, fine_tune
from .language import block_losses, losses_of, spread
from .reproduction import Measurement, Options, require, require_at_least
from .subject import Subject, load_subject, place

NEEDED = ("kaiming", "corda_kpm", "corda_ipm")
KNOWLEDGE, TASK = "plots", "problems"
STARTS = {
    "kaiming": {"init_lora_weights": True},
    "corda_kpm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    "corda_ipm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}},
    "pissa": {"init_lora_weights": "pissa"},
}
CALIBRATED_ON = {"corda_kpm": KNOWLEDGE, "corda_ipm": TASK}
DRAWN = ("kaiming",)
"""Starts that depend on the seed; the others are computed once."""


@dataclass
class CordaKnowledgeOptions(Options):
    """What is trained and measured.

    Attributes:
        model: a causal model, as `load_subject` takes it.
        blocks_apart: all linear layers of one of so many blocks are adapted; 1 means all blocks.
        rank: alpha is the same, so that the scaling is 1.
        rates: learning rates by start; `kaiming`, `corda_kpm` and `corda_ipm` must be there.
        repeats: the number of seeds, for the order of the data and LoRA's own random start. The
            first seed tries every rate, the others repeat the rates that won with it.
        steps, batch_size, length: of each training, on word problems.
        measured_steps: the steps after which learning and forgetting are measured.
        calibration_tokens: of CorDA, in either mode.
        learnt_tokens, kept_tokens: held-out problems of other templates; plots of other films.
    """

    model: str = "smollm2"
    blocks_apart: int = 1
    rank: int = 16
    rates: dict[str, list[float]] = field(
        default_factory=lambda: {
            "kaiming": [3e-4, 1e-3, 3e-3, 1e-2],
            "corda_kpm": [1e-5, 3e-5, 1e-4, 3e-4],
            "corda_ipm": [3e-5, 1e-4, 3e-4],
        }
    )
    repeats: int = 2
    steps: int = 6
    measured_steps: list[int] = field(default_factory=lambda: [3, 6])
    batch_size: int = 2
    length: int = 64
    calibration_tokens: int = 1024
    learnt_tokens: int = 256
    kept_tokens: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            "rates",
            set(NEEDED) <= set(self.rates) <= set(STARTS),
            f"rates of some of {', '.join(STARTS)}, with {', '.join(NEEDED)} among them",
        )
        positive = all(min(rates, default=0) > 0 for rates in self.rates.values())
        require(self, "rates", positive, "one or more numbers > 0 for each start")
        require_at_least(self, 1, "repeats", "rank")
        inside = self.measured_steps and all(0 < s <= self.steps for s in self.measured_steps)
        ascending = sorted(set(self.measured_steps)) == self.measured_steps
        require(
            self,
            "measured_steps",
            bool(inside) and ascending,
            f"steps from 1 to steps={self.steps}, ascending",
        )


def measure(options: CordaKnowledgeOptions) -> Measurement:
    """Train every start at every rate, and measure what it learns and forgets."""
    subject = load_subject(options.model)
    subject.model.to(place(options.device))
    held = hold(
        subject.model,
        held_out(subject, TASK, options.learnt_tokens, options.length),
        held_out(subject, KNOWLEDGE, options.kept_tokens, options.length),
        options.batch_size * 2,
    )
    train = joined_blocks(
        subject.tokenizer, load_texts(TASK), length=options.length,
        # No seed sees a block twice, and the seeds see different blocks.
        tokens=options.repeats * options.steps * options.batch_size * options.length,
    )  # fmt: skip
    steps = all_trainings(subject, train, held, options)
    facts = {
        "model": f"{subject.described}; all linear layers of the blocks, alpha = r",
        "learned": f"word problems with worked solutions; measured on {held.learned.numel()} "
        f"tokens of other templates (loss before: {held.loss:.3f})",
        "kept": f"{held.kept.numel()} tokens of held-out film plots (perplexity before: "
        f"{np.exp(held.losses.mean()):.2f})",
        "seeds": "the first at every rate, the others at those that won with it: best where half "
        "or all of the common fall is learned, or at the end",
        "the paper’s": "Llama-2-7B, r = 128, MetaMathQA 100K, one epoch, one rate (2e-5); "
        "kept: exact match on TriviaQA, NQ open and WebQS, calibrated on such questions",
    }
    return Measurement(options, {"steps": steps}, facts)


def held_out(
    subject: Subject, corpus: str, tokens: int, length: int
) -> Int[Tensor, "blocks length"]:
    """Blocks from texts at equal distances through the split."""
    count = max(1, tokens // length)
    texts = load_texts(corpus, "test")
    # Take about twice as many texts as are needed: most texts fill half a block or more.
    some = texts[:: max(1, len(texts) // (4 * count))]
    return spread(joined_blocks(subject.tokenizer, some, length=length), count)


def all_trainings(
    subject: Subject, train: Tensor, held: Held, options: CordaKnowledgeOptions
) -> pd.DataFrame:
    """Rows of all trainings: method, rate, seed, and those of `trajectory`."""
    rates, rows = options.rates, []
    parked: dict[str, tuple[LoraModel, Injection]] = {}
    for seed in range(options.seed, options.seed + options.repeats):
        for start in options.rates:
            with adapted(subject, start, seed, options, parked) as model:
                for rate in rates[start]:
                    say(f"  {LABELS[start]}, learning rate {rate:g}, seed {seed}")
                    with started_again(model):
                        found = trajectory(
                            model, train, constant_training(options, rate), held,
                            options.measured_steps, seed=seed, device=options.device,
                        )  # fmt: skip
                    rows += [{"method": start, "rate": rate, "seed": seed, **row} for row in found]
        if seed == options.seed:
            rates = winning_rates(pd.DataFrame(rows))
    return pd.DataFrame(rows)


@contextmanager
def adapted(
    subject: Subject,
    start: str,
    seed: int,
    options: CordaKnowledgeOptions,
    parked: dict[str, tuple[LoraModel, Injection]],
) -> Iterator[LoraModel]:
    """The model with a start, for as long as the context lasts.

    Args:
        parked: starts that were computed before, taken off the model; this one is added to them.
    """
    if start in parked:
        model, adapter = parked.pop(start)
        model.attach_adapter(adapter)
    else:
        model = injected(subject, start, calibrated(subject, start, options), seed, options)
    try:
        yield model
    finally:
        adapter = model.detach_adapter()
        if start not in DRAWN:
            parked[start] = model, adapter


def injected(
    subject: Subject,
    start: str,
    calibration: Calibration | None,
    seed: int,
    options: CordaKnowledgeOptions,
) -> LoraModel:
    try:
        return get_peft_model(
            subject.model, config_of(subject, start, options),
            calibration=calibration, seed=seed, cache=False,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigurationError(f"rank={options.rank}: {error}") from error


def calibrated(subject: Subject, start: str, options: CordaKnowledgeOptions) -> Calibration | None:
    if start not in CALIBRATED_ON:
        return None
    corpus = CALIBRATED_ON[start]
    blocks = joined_blocks(
        subject.tokenizer, load_texts(corpus), length=options.length,
        tokens=options.calibration_tokens,
    )  # fmt: skip
    say(f"  {LABELS[start]}: calibration on {blocks.numel()} tokens of {corpus}")
    batches = language_batches(blocks, 2 * options.batch_size)
    return calibrate(subject.model, config_of(subject, start, options), batches)


def config_of(subject: Subject, start: str, options: CordaKnowledgeOptions) -> LoraConfig:
    return LoraConfig(
        r=options.rank, lora_alpha=options.rank, task_type="CAUSAL_LM",
        target_modules=[layer.name for layer in subject.every(options.blocks_apart)],
        **STARTS[start],
    )  # fmt: skip


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
        losses.append(losses_of(logits[:, :-1], some.to(home)).cpu().numpy())
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
    """The mean KL(original ‖ model) of each block of `kept`, and its loss; nats."""
    home = next(model.parameters()).device
    divergences, losses = [], []
    for some, before in zip(
        held.kept.split(batch_size), held.original.split(batch_size), strict=True
    ):
        logits = model(input_ids=some.to(home), use_cache=False).logits.float()
        losses.append(losses_of(logits[:, :-1], some.to(home)).cpu().numpy())
        found = divergence_of(before.to(home), logits)
        divergences.append(found.double().mean(1).clamp_min(0).cpu().numpy())
    return np.concatenate(divergences), np.concatenate(losses)


def divergence_of(
    before: Float[Tensor, "some length words"], logits: Float[Tensor, "some length words"]
) -> Float[Tensor, "some length"]:
    """KL(p ‖ q) at each position, `before` log p and `logits` log q up to a constant of each.

    With d = logits - before, KL = log E_p exp(d - E_p d). Its rounding error is relative to KL and
    not to the entropies, so that float32 is enough.
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
    """Afterwards the adapter is what it was before; the base is frozen."""
    trained = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in trained.items():
                parameter.copy_(value)
