"""The trainings of CorDA's knowledge-preserved mode, and the way from a model to claims."""

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
from ..claim import Claim
from ..corpus import joined_blocks, language_batches, load_texts
from ..language import spread
from ..reproduction import (
    Figure,
    Measurement,
    Options,
    Reproduction,
    Table,
    require,
    require_at_least,
)
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
            set(claims.NEEDED) <= set(self.rates) <= set(STARTS),
            f"rates of some of {', '.join(STARTS)}, with {', '.join(claims.NEEDED)} among them",
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
        "model": subject.described,
        "adapter": f"r = alpha = {options.rank}, all linear layers of "
        + ("all blocks" if options.blocks_apart == 1 else "a few blocks")
        + "; AdamW, constant rate, float32",
        "learned": f"word problems with worked solutions, {options.steps} steps of "
        f"{options.batch_size} × {options.length} tokens; measured on {held.learned.numel()} "
        f"tokens of other templates (loss before: {held.loss:.3f})",
        "kept": f"{held.kept.numel()} tokens of held-out film plots (perplexity before: "
        f"{np.exp(held.losses.mean()):.2f})",
        "calibration": f"{options.calibration_tokens} tokens: kpm of other plots, ipm of "
        "the problems that are trained on",
        "rates": "; ".join(
            f"{claims.LABELS[start]} {', '.join(f'{rate:g}' for rate in rates)}"
            for start, rates in options.rates.items()
        ),
        "seeds": f"{options.repeats}"
        + (
            "; the first at every rate, the others at those that won with it: best where half "
            "or all of the common fall is learned, or at the end"
            if options.repeats > 1
            else ""
        ),
        "the paper’s": "Llama-2-7B, r = 128, MetaMathQA 100K, one epoch, one rate (2e-5); "
        "kept: exact match on TriviaQA, NQ open and WebQS, calibrated on such questions",
    }
    return Measurement(options, {"steps": steps}, facts)


def judge_all(measured: Measurement) -> list[Claim]:
    """The claims, at an equal amount learned."""
    steps = measured["steps"]
    return claims.all_claims(steps, at_shares(steps), reached_by_all(steps))


def tabulate(measured: Measurement) -> list[Table]:
    """Forgetting at an equal amount learned, and at the end."""
    steps = measured["steps"]
    return [
        *figures.equal_tables(at_shares(steps), reached_by_all(steps)),
        figures.end_table(steps),
    ]


def draw(measured: Measurement) -> list[Figure]:
    """Forgetting against learning."""
    return [figures.tradeoff_figure(measured["steps"], reached_by_all(measured["steps"]))]


def discuss(measured: Measurement) -> list[str]:
    """Say how this comparison differs from the paper's, and what it cannot show."""
    return [
        "The paper trains every start at one learning rate and compares what is left of the "
        "knowledge at the end. A start that learns less forgets less, so that comparison also "
        "measures how far each start moved. Here the starts are compared where they have learned "
        "the same amount. Each has its best rate, which is chosen on the same held-out texts.",
        "KL counts every change of the predictions, also an improvement. "
        + improved(measured["steps"])
        + " Neither measures the recall of facts, as the paper does.",
        f"{measured.options.steps} steps show how a training begins, not where it ends.",
    ]


def improved(steps: pd.DataFrame) -> str:
    """Count the trainings that end with a lower perplexity on plots than the original's."""
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
                    say(f"  {claims.LABELS[start]}, learning rate {rate:g}, seed {seed}")
                    with started_again(model):
                        found = trajectory(
                            model, train, training(rate, options), held,
                            options.measured_steps, seed=seed, device=options.device,
                        )  # fmt: skip
                    rows += [{"method": start, "rate": rate, "seed": seed, **row} for row in found]
        if seed == options.seed:
            rates = winning_rates(pd.DataFrame(rows))
    return pd.DataFrame(rows)


def training(rate: float, options: CordaKnowledgeOptions) -> TrainingConfig:
    return TrainingConfig(
        steps=options.steps, batch_size=options.batch_size, learning_rate=rate,
        schedule="constant", warmup=0.0, max_grad_norm=None,
    )  # fmt: skip


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
    say(f"  {claims.LABELS[start]}: calibration on {blocks.numel()} tokens of {corpus}")
    batches = language_batches(blocks, 2 * options.batch_size)
    return calibrate(subject.model, config_of(subject, start, options), batches)


def config_of(subject: Subject, start: str, options: CordaKnowledgeOptions) -> LoraConfig:
    return LoraConfig(
        r=options.rank, lora_alpha=options.rank, task_type="CAUSAL_LM",
        target_modules=[layer.name for layer in subject.every(options.blocks_apart)],
        **STARTS[start],
    )  # fmt: skip


REPRODUCTION = Reproduction(
    name="corda_knowledge",
    title="CorDA: what a fine-tuning forgets",
    source="Yang et al. 2024, arXiv 2406.05223, section 4",
    question="At the same amount learned, does CorDA’s knowledge-preserved mode forget less than "
    "LoRA’s usual start?",
    options=CordaKnowledgeOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
    discuss=discuss,
)
