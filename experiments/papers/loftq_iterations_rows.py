"""All starts of an encoder and a language model, measured, and fine-tunings of the encoder.

The errors are those of each layer and of the whole model; LoftQ's path is measured by iteration.
Fine-tunings train the adapter and the classifier's head, which is the same for every start and
seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor

from lora_init import Calibration, LoraConfig, LoraModel, calibrate, init_factors

from ..config.training import TrainingConfig
from ..console import say
from ..data import Labelled, rotten_tomatoes
from ..tasks.text_classification import TextClassification
from ..training.loop import make_accelerator, train
from .corpus import joined_blocks, language_batches, load_texts, sentence_batches
from .language import spread
from .loftq_iterations_errors import (
    HiddenStates,
    Measure,
    NextTokens,
    mean_square_output,
    relative_norm,
    remaining,
    second_moments,
)
from .loftq_iterations_starts import LOFTQ, PLAIN, SVD_FIRST, Ground, Start, starts
from .reproduction import Measurement, Options, require
from .subject import Layer, load_subject, place

PAPERS_ITERATIONS = 5
"""LoftQ's default T, at which one iteration is compared with several."""
BATCH = 16
TRAINED_BITS = 2
TASK = "SEQ_CLS"
Item = TypeVar("Item")


@dataclass
class LoftqIterationsOptions(Options):
    """What is measured and trained.

    Attributes:
        encoder, language_model: the grid runs on the first, perplexity on the second.
        bits, ranks: of the encoder's grid. 2 and 4 bits must be among them. 8 bits, where little
            is lost, are measured at the largest rank only.
        iterations: T of LoftQ on the encoder; 1 must be among them.
        order_iterations: T at which the alternation also begins with an SVD; some of `iterations`.
        sentences, held_out_sentences: reviews for QERA's calibration, and for the errors.
        sentence_length: the largest number of tokens of a review.
        encoder_every: quantize the layers of one of so many blocks.
        language_bits, language_ranks, language_iterations: the shorter lists of the language model.
        tokens, held_out_tokens, block_length: film plots for calibration, and for the errors.
        language_every: quantize the layers of one of so many blocks.
        measured_every: measure the errors of the layers of one of so many blocks.
        training_steps, training_batch, learning_rate: of the fine-tuning from 2 bits, on reviews.
            The head is trained with the adapter.
        training_seeds: orders of the data; at least two.
        validation_sentences: reviews on which the fine-tuned encoders are compared.
    """

    encoder: str = "minilm"
    language_model: str = "smollm2"
    bits: list[int] = field(default_factory=lambda: [8, 4, 2])
    ranks: list[int] = field(default_factory=lambda: [8, 32])
    iterations: list[int] = field(default_factory=lambda: [1, 2, 5])
    order_iterations: list[int] = field(default_factory=lambda: [5])
    sentences: int = 256
    held_out_sentences: int = 32
    sentence_length: int = 32
    encoder_every: int = 2
    language_bits: list[int] = field(default_factory=lambda: [8, 4, 2])
    language_ranks: list[int] = field(default_factory=lambda: [8, 32])
    language_iterations: list[int] = field(default_factory=lambda: [1, 5])
    tokens: int = 2048
    held_out_tokens: int = 512
    block_length: int = 64
    language_every: int = 7
    measured_every: int = 7
    training_steps: int = 8
    training_batch: int = 16
    learning_rate: float = 1e-3
    training_seeds: list[int] = field(default_factory=lambda: [0, 1])
    validation_sentences: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, needed in (("bits", {2, 4}), ("language_bits", {4})):
            names = " and ".join(map(str, sorted(needed)))
            fits = needed <= set(getattr(self, name)) <= {2, 4, 8}
            require(self, name, fits, f"some of 2, 4 and 8, with {names} among them")
        for name in ("ranks", "language_ranks", "language_iterations", "order_iterations"):
            require(self, name, min(getattr(self, name), default=0) >= 1, "integers >= 1")
        early = {t for t in self.iterations if t <= PAPERS_ITERATIONS}
        require(
            self,
            "iterations",
            min(self.iterations, default=0) == 1 and len(early) > 1,
            f"integers >= 1, with 1 and another one up to {PAPERS_ITERATIONS} among them",
        )
        among = set(self.order_iterations) <= set(self.iterations)
        require(self, "order_iterations", among, f"some of iterations={self.iterations}")
        different = len(set(self.training_seeds)) > 1
        require(self, "training_seeds", different, "two different seeds or more")


def measure(options: LoftqIterationsOptions) -> Measurement:
    """Measure every start of both models, and train the encoder from three of them."""
    say(f"  {options.encoder}: looking at the layers’ inputs")
    first = encoder_study(options)
    cases = [
        (bits, rank)
        for bits in options.bits
        for rank in options.ranks
        if bits < 8 or rank == max(options.ranks)
    ]
    encoder = measure_starts(
        first, cases, options.iterations, options.order_iterations, closed_form_last=True
    )
    trained = fine_tunings(first, options, max(options.order_iterations))
    say(f"  {options.language_model}: looking at the layers’ inputs")
    second = language_study(options)
    cases = [(bits, rank) for bits in options.language_bits for rank in options.language_ranks]
    language = measure_starts(
        second, cases, options.language_iterations, [], closed_form_last=False
    )
    original = second.measure(second.ground.subject.model).perplexity
    frames = {
        **{f"encoder {name}": frame for name, frame in encoder.items()},
        **{f"language {name}": frame for name, frame in language.items()},
        "trained": trained,
        "original": pd.DataFrame([{"perplexity": original}]),
    }
    facts = {
        "encoder": f"{first.ground.subject.described}; {len(first.ground.targets)} layers are "
        "quantized; film reviews",
        "language model": f"{second.ground.subject.described}; {len(second.ground.targets)} layers "
        "are quantized; film plots",
        "quantizers": "NF4 and NF2 with one scale for 64 weights, int8 with one for a row; the "
        "papers’ 4.25 bits are 4-bit blocks of 32 with a scale of 8 bits",
        "the papers’": "TinyLlama-1.1B on wikitext2 (QERA); DeBERTaV3-base on GLUE, 2 bits (LoftQ)",
    }
    return Measurement(options, frames, facts)


@dataclass(frozen=True)
class Study:
    """One model, its data, and how its errors are measured.

    Attributes:
        measured: the targets whose own errors are measured.
        held_out: of the layers' inputs on data that no method has seen.
        measure: the whole model's error on the same data.
    """

    ground: Ground
    measured: list[Layer]
    held_out: Calibration
    measure: Measure


def encoder_study(options: LoftqIterationsOptions) -> Study:
    """An encoder on film reviews."""
    subject = load_subject(options.encoder, task_type="SEQ_CLS")
    counts = {"train": options.sentences, "test": options.held_out_sentences}
    seen, held_out = (
        sentence_batches(
            subject.tokenizer, at_equal_distances(load_texts("reviews", split), count),
            length=options.sentence_length, size=BATCH,
        )
        for split, count in counts.items()
    )  # fmt: skip
    every = options.encoder_every
    return study(subject, every, every, seen, held_out, HiddenStates, held_out, options)


def language_study(options: LoftqIterationsOptions) -> Study:
    """A language model on film plots."""
    subject = load_subject(options.language_model)
    seen, held_out = (
        joined_blocks(
            subject.tokenizer, load_texts("plots", split), length=options.block_length,
            tokens=tokens,
        )
        for split, tokens in (("train", options.tokens), ("test", options.held_out_tokens))
    )  # fmt: skip
    return study(
        subject, options.language_every, options.measured_every, language_batches(seen, 4),
        language_batches(held_out, 4), NextTokens, held_out, options,
    )  # fmt: skip


def at_equal_distances(items: Sequence[Item], count: int) -> list[Item]:
    """So many of them, by the rule of `spread`: neighbors are reviews of one film."""
    chosen = spread(torch.arange(len(items))[:, None], count)
    return [items[index] for index in chosen[:, 0].tolist()]


def study(subject, every, measured_every, seen, held_out, measure, measured_on, options) -> Study:
    """Move everything to its device, and look at the inputs of all layers."""
    device = place(options.device)
    subject.model.to(device)
    targets = subject.every(every)
    names = {layer.name for layer in targets}
    measured = [layer for layer in subject.every(measured_every) if layer.name in names]
    config = LoraConfig(r=1, target_modules=sorted(names), init_lora_weights="qera")
    narrow = LoraConfig(
        r=1, target_modules=[layer.name for layer in measured], init_lora_weights="qera"
    )
    ground = Ground(
        subject, targets,
        weights={layer.name: subject.weight(layer).clone() for layer in targets},
        calibration=calibrate(subject.model, config, seen),
        seed=options.seed,
    )  # fmt: skip
    return Study(
        ground, measured,
        held_out=calibrate(subject.model, narrow, held_out),
        measure=measure(subject.model, moved(measured_on, device)),
    )  # fmt: skip


def moved(data, device: torch.device):
    if isinstance(data, Tensor):
        return data.to(device)
    return [{name: value.to(device) for name, value in batch.items()} for batch in data]


def measure_starts(
    found: Study,
    cases: Iterable[tuple[int, int]],
    iterations: list[int],
    order_iterations: list[int],
    *,
    closed_form_last: bool,
) -> dict[str, pd.DataFrame]:
    """Every start at every case, a number of bits and a rank.

    Returns:
        "layers": a row for each start and layer; `seen` is the output error on the calibration's
        inputs. "models": means over the layers, the model's error and perplexity. "paths": the
        weight's error after each iteration of LoftQ's longest alternation. "texts": the model's
        error and loss on each held-out sentence or block; an encoder has no loss.
    """
    ground = found.ground
    names = [layer.name for layer in found.measured]
    moments = {
        "output": second_moments(found.held_out, names),
        "seen": second_moments(ground.calibration, names),
    }
    whole = {
        inputs: {
            name: mean_square_output(ground.weights[name], moments[inputs][name]) for name in names
        }
        for inputs in moments
    }
    layers, models, paths, texts = [], [], [], []
    for bits, rank in cases:
        say(f"  {ground.subject.name}: {bits} bits, rank {rank}")
        for start in starts(
            ground, bits, rank, iterations, order_iterations,
            closed_form_last=closed_form_last,
        ):  # fmt: skip
            case = {
                "model": ground.subject.short, "bits": bits, "rank": rank,
                "method": start.method, "T": start.iterations,
            }  # fmt: skip
            rows = layer_rows(found, start, moments, whole)
            layers += [case | row for row in rows]
            apart = found.measure(start.model)
            means = pd.DataFrame(rows)[["weight", "output", "seen"]].mean()
            models.append(
                case | means.to_dict() | {"error": apart.error, "perplexity": apart.perplexity}
            )
            losses = apart.losses or [float("nan")] * len(apart.texts)
            texts += [
                case | {"text": number, "error": error, "loss": loss}
                for number, (error, loss) in enumerate(zip(apart.texts, losses, strict=True))
            ]
            if start.method == LOFTQ and start.iterations == max(iterations):
                paths += [case | row for row in path_rows(start)]
    found = {"layers": layers, "models": models, "paths": paths, "texts": texts}
    return {name: pd.DataFrame(rows) for name, rows in found.items()}


def layer_rows(found: Study, start: Start, moments: dict, whole: dict) -> list[dict]:
    rows = []
    for layer in found.measured:
        weight = found.ground.weights[layer.name]
        left = remaining(start.model.layers[layer.name], weight)
        row = {"layer": layer.name, "kind": layer.kind, "weight": relative_norm(left, weight)}
        for inputs, by_layer in moments.items():
            square = mean_square_output(left, by_layer[layer.name]) / whole[inputs][layer.name]
            row[inputs] = max(square, 0.0) ** 0.5
        rows.append(row)
    return rows


def path_rows(start: Start) -> list[dict]:
    """The weight's error after each iteration, as LoftQ itself reports it."""
    return [
        {"layer": layer.name, "iteration": number, "weight": error}
        for layer in start.model.init_report().layers
        for number, error in enumerate(layer.details["error_by_iteration"], start=1)
    ]


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
        say(f"  {found.ground.subject.name}: training from {TRAINED_BITS} bits, {method}")
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
    chosen = {"name": "loftq", "loftq_bits": TRAINED_BITS, "loftq_iter": iterations}
    with ground.started(rank, chosen, task_type=TASK) as model:
        yield LOFTQ, model
    chosen = {"name": "qpissa", "bits": TRAINED_BITS, "iterations": iterations}
    with ground.started(rank, chosen, task_type=TASK) as model:
        ground.refit(model, ground.best_for_weight)
        yield SVD_FIRST, model

    def drawn(name, lost, rank, scaling):
        made = init_factors(lost, "kaiming", r=rank, seed=ground.seed, name=name)
        return made.lora_A, made.lora_B

    with ground.started(rank, {"name": "qera", "bits": TRAINED_BITS}, task_type=TASK) as model:
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
