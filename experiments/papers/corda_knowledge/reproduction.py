"""Settings, and the way from a model to findings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from lora_init import Calibration, LoraConfig, LoraModel, calibrate, get_peft_model
from lora_init.injection import Injection

from ...config.training import TrainingConfig
from ...console import say
from ...errors import ConfigurationError
from ..corpus import joined_blocks, language_batches, load_texts
from ..language import spread
from ..reproduction import Findings, Options, Paper
from ..subject import Subject, load_subject, place
from . import claims, figures
from .tradeoff import (
    at_shares,
    reached_by_all,
    winning_rates,
)
from .trajectories import Held, hold, started_again, trajectory

KNOWLEDGE, TASK = "plots", "problems"
STARTS = {
    "kaiming": {"init_lora_weights": True},
    "corda_kpm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    "corda_ipm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}},
    "pissa": {"init_lora_weights": "pissa"},
}
CALIBRATED_ON = {"corda_kpm": KNOWLEDGE, "corda_ipm": TASK}
DRAWN = ("kaiming",)
"""Starts that another seed draws anew; the others are computed once."""


@dataclass
class CordaKnowledgeSettings(Options):
    """Settings.

    Attributes:
        model: as of `subjects.load_subject`, a causal model.
        blocks_apart: every so many-th block of the model is adapted, all its linear layers; 1: all.
        rank: alpha is the same, so that the scaling is 1.
        rates: learning rates by start; `kaiming`, `corda_kpm` and `corda_ipm` must be there.
        repeats: seeds, of the order of the data and of LoRA's own draw; the first tries every rate,
            the others repeat those that won with it.
        steps, batch_size, length: of each training, on word problems.
        measured_steps: when learnt and forgotten are measured.
        calibration_tokens: of CorDA, in either mode.
        learnt_tokens, kept_tokens: held-out problems, of other templates; plots of other films.
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
        if not set(claims.NEEDED) <= set(self.rates) <= set(STARTS):
            raise ValueError(
                f"rates of {sorted(self.rates)}; allowed are those of {', '.join(STARTS)}, and "
                f"{', '.join(claims.NEEDED)} must be among them"
            )
        for start, rates in self.rates.items():
            if not rates or min(rates) <= 0:
                raise ValueError(f"rates.{start}={rates}; allowed are one or more numbers > 0")
        if self.repeats < 1 or self.rank < 1:
            raise ValueError(f"repeats={self.repeats}, rank={self.rank}; allowed are integers >= 1")
        allowed = self.measured_steps and all(0 < s <= self.steps for s in self.measured_steps)
        if not allowed or sorted(set(self.measured_steps)) != self.measured_steps:
            raise ValueError(
                f"measured_steps={self.measured_steps}; allowed are steps from 1 to "
                f"steps={self.steps}, ascending"
            )


def reproduce(settings: CordaKnowledgeSettings) -> Findings:
    """Train, measure, and judge."""
    subject = load_subject(settings.model)
    subject.model.to(place(settings.device))
    held = hold(
        subject.model,
        held_out(subject, TASK, settings.learnt_tokens, settings.length),
        held_out(subject, KNOWLEDGE, settings.kept_tokens, settings.length),
        settings.batch_size * 2,
    )
    train = joined_blocks(
        subject.tokenizer, load_texts(TASK), length=settings.length,
        # No seed sees a block twice, and they do not all see the same ones.
        tokens=settings.repeats * settings.steps * settings.batch_size * settings.length,
    )  # fmt: skip
    steps = measured(subject, train, held, settings)
    fall, equal = reached_by_all(steps), at_shares(steps)
    return Findings(
        claims=claims.all_claims(steps, equal, fall),
        setting={
            "model": subject.described,
            "adapter": f"r = alpha = {settings.rank}, all linear layers of "
            + ("all blocks" if settings.blocks_apart == 1 else "a few blocks")
            + "; AdamW, constant rate, float32",
            "learnt": f"word problems with worked solutions, {settings.steps} steps of "
            f"{settings.batch_size} × {settings.length} tokens; measured on {held.learnt.numel()} "
            f"tokens of other templates (loss before: {held.loss:.3f})",
            "kept": f"{held.kept.numel()} tokens of held-out film plots (perplexity before: "
            f"{np.exp(held.losses.mean()):.2f})",
            "calibration": f"{settings.calibration_tokens} tokens: kpm of other plots, ipm of "
            "the problems that are trained on",
            "rates": "; ".join(
                f"{claims.LABELS[start]} {', '.join(f'{rate:g}' for rate in rates)}"
                for start, rates in settings.rates.items()
            ),
            "seeds": f"{settings.repeats}"
            + (
                "; the first at every rate, the others at those that won with it: best where half "
                "or all of the common fall is learnt, or at the end"
                if settings.repeats > 1
                else ""
            ),
            "the paper’s": "Llama-2-7B, r = 128, MetaMathQA 100K, one epoch, one rate (2e-5); "
            "kept: exact match on TriviaQA, NQ open and WebQS, calibrated on such questions",
        },
        tables=[*figures.equal_tables(equal, fall), figures.end_table(steps)],
        figures=[figures.tradeoff_figure(steps, fall)],
        discussion=discussion(steps, settings),
    )


def discussion(steps: pd.DataFrame, settings: CordaKnowledgeSettings) -> list[str]:
    return [
        "The paper trains every start at one learning rate and compares what is left of the "
        "knowledge at the end. Who learns less forgets less, so that comparison also measures how "
        "far each start moved; here all are compared where they have learnt the same, each at the "
        "best of its rates, which is chosen on the same held-out texts.",
        "KL counts every change of the predictions, for the better, too. " + improved(steps)
        + " Neither is the recall of facts, which the paper measures.",
        f"{settings.steps} steps show where a training sets out, not where it ends.",
    ]  # fmt: skip


def improved(steps: pd.DataFrame) -> str:
    """In how many trainings the plots' perplexity fell below the original's."""
    before = steps.loc[steps["step"] == 0, "perplexity"].iloc[0]
    last = steps.groupby(["method", "rate", "seed"])[["step", "perplexity"]].last()
    below = int((last["perplexity"] < before).sum())
    return (
        f"The perplexity on plots ends below the original model’s in {below} of {len(last)} "
        "trainings: learning worked solutions need not cost it."
        if below
        else "The perplexity on plots ends below the original model’s in none of "
        f"{len(last)} trainings."
    )


def held_out(
    subject: Subject, corpus: str, tokens: int, length: int
) -> Int[Tensor, "blocks length"]:
    """Blocks from texts at equal distances through the split: about twice as many as are needed."""
    count = max(1, tokens // length)
    texts = load_texts(corpus, "test")
    # A text fills half a block or more: shorter ones are few.
    some = texts[:: max(1, len(texts) // (4 * count))]
    return spread(joined_blocks(subject.tokenizer, some, length=length), count)


def measured(
    subject: Subject, train: Tensor, held: Held, settings: CordaKnowledgeSettings
) -> pd.DataFrame:
    """Rows of all trainings: method, rate, seed, and those of `trajectory`."""
    rates, rows = settings.rates, []
    parked: dict[str, tuple[LoraModel, Injection]] = {}
    for seed in range(settings.seed, settings.seed + settings.repeats):
        for start in settings.rates:
            with adapted(subject, start, seed, settings, parked) as model:
                for rate in rates[start]:
                    say(f"  {claims.LABELS[start]}, learning rate {rate:g}, seed {seed}")
                    with started_again(model):
                        found = trajectory(
                            model, train, training(rate, settings), held,
                            settings.measured_steps, seed=seed, device=settings.device,
                        )  # fmt: skip
                    rows += [{"method": start, "rate": rate, "seed": seed, **row} for row in found]
        if seed == settings.seed:
            rates = winning_rates(pd.DataFrame(rows))
    return pd.DataFrame(rows)


def training(rate: float, settings: CordaKnowledgeSettings) -> TrainingConfig:
    return TrainingConfig(
        steps=settings.steps, batch_size=settings.batch_size, learning_rate=rate,
        schedule="constant", warmup=0.0, max_grad_norm=None,
    )  # fmt: skip


@contextmanager
def adapted(
    subject: Subject,
    start: str,
    seed: int,
    settings: CordaKnowledgeSettings,
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
        model = injected(subject, start, calibrated(subject, start, settings), seed, settings)
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
    settings: CordaKnowledgeSettings,
) -> LoraModel:
    try:
        return get_peft_model(
            subject.model, config_of(subject, start, settings),
            calibration=calibration, seed=seed, cache=False,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigurationError(f"rank={settings.rank}: {error}") from error


def calibrated(
    subject: Subject, start: str, settings: CordaKnowledgeSettings
) -> Calibration | None:
    if start not in CALIBRATED_ON:
        return None
    corpus = CALIBRATED_ON[start]
    blocks = joined_blocks(
        subject.tokenizer, load_texts(corpus), length=settings.length,
        tokens=settings.calibration_tokens,
    )  # fmt: skip
    say(f"  {claims.LABELS[start]}: calibration on {blocks.numel()} tokens of {corpus}")
    batches = language_batches(blocks, 2 * settings.batch_size)
    return calibrate(subject.model, config_of(subject, start, settings), batches)


def config_of(subject: Subject, start: str, settings: CordaKnowledgeSettings) -> LoraConfig:
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.rank, task_type="CAUSAL_LM",
        target_modules=[layer.name for layer in subject.every(settings.blocks_apart)],
        **STARTS[start],
    )  # fmt: skip


PAPER = Paper(
    name="corda_knowledge",
    title="CorDA: what a fine-tuning forgets",
    source="Yang et al. 2024, arXiv 2406.05223, section 4",
    question="At the same amount learnt, does CorDA’s knowledge-preserved mode forget less than "
    "LoRA’s usual start?",
    settings=CordaKnowledgeSettings,
    reproduce=reproduce,
)
