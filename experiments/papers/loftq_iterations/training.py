"""Short fine-tunings from a quantized encoder: does the order of the alternation show in them?

What is trained is the adapter and the classifier's head, drawn at random: every arm and seed starts
from the same one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import torch

from lora_init import LoraModel, init_factors

from ...config.training import TrainingConfig
from ...console import say
from ...data import Labelled, rotten_tomatoes
from ...tasks.text_classification import TextClassification
from ...training.loop import make_accelerator, train
from ..subject import place
from .options import LoftqIterationsOptions
from .starts import LOFTQ, PLAIN, SVD_FIRST, Ground
from .study import Study, at_equal_distances

BITS = 2
TASK = "SEQ_CLS"


def fine_tunings(found: Study, options: LoftqIterationsOptions, iterations: int) -> pd.DataFrame:
    """A row a start, seed and held-out sentence: its loss, and whether it was classified right.

    Its column `chance` is the accuracy of always naming the sentences' most frequent label.

    Args:
        iterations: T of both orders.
    """
    rank = max(options.ranks)
    data = rotten_tomatoes.load(rotten_tomatoes.RottenTomatoes())
    train_count = options.training_steps * options.training_batch
    examples = at_equal_distances(data.train, train_count)
    validation = at_equal_distances(data.validation, options.validation_sentences)
    task = TextClassification(found.ground.subject.tokenizer, options.sentence_length)
    chance = task.majority(validation)
    rows = []
    for method, model in arms(found.ground, rank, iterations):
        say(f"  {found.ground.subject.name}: training from {BITS} bits, {method}")
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        for seed in options.training_seeds:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(start[name])
            rows += [
                {"method": method, "seed": seed, "chance": chance, **row}
                for row in trained(model, task, examples, validation, options, seed)
            ]
    return pd.DataFrame(rows)


def arms(ground: Ground, rank: int, iterations: int) -> Iterator[tuple[str, LoraModel]]:
    """Both orders at the same T, and quantization with a start that corrects nothing (QLoRA's)."""
    chosen = {"name": "loftq", "loftq_bits": BITS, "loftq_iter": iterations}
    with ground.started(rank, chosen, task_type=TASK) as model:
        yield LOFTQ, model
    chosen = {"name": "qpissa", "bits": BITS, "iterations": iterations}
    with ground.started(rank, chosen, task_type=TASK) as model:
        ground.refit(model, ground.best_for_weight)
        yield SVD_FIRST, model

    def drawn(name, lost, rank, scaling):
        made = init_factors(lost, "kaiming", r=rank, seed=ground.seed, name=name)
        return made.lora_A, made.lora_B

    with ground.started(rank, {"name": "qera", "bits": BITS}, task_type=TASK) as model:
        ground.refit(model, drawn)
        yield PLAIN, model


def trained(
    model: LoraModel,
    task: TextClassification,
    examples: list[Labelled],
    validation: list[Labelled],
    options: LoftqIterationsOptions,
    seed: int,
) -> list[dict]:
    training = TrainingConfig(
        steps=options.training_steps, batch_size=options.training_batch,
        learning_rate=options.learning_rate, max_length=options.sentence_length,
        validate_at_end=False,
    )  # fmt: skip
    train(
        model, task, examples, training, seed=seed,
        accelerator=make_accelerator(training, options.device), record=lambda row: None,
    )  # fmt: skip
    model.eval()
    with torch.no_grad():
        return [
            {"text": row["id"], "loss": row["loss"], "right": float(row["correct"])}
            for row in task.rows(model, validation, 64, place(options.device))
        ]
