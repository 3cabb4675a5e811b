"""Short trainings of a classifier from many starts.

The head is trained alone first and then stays, so that the adapter makes all of the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_init import Calibration, LoraConfig, LoraModel, calibrate
from lora_init.layer import layer_generator

from ..config.training import TrainingConfig
from ..data import rotten_tomatoes
from ..data.splits import Splits
from ..errors import RunFailed
from ..tasks.text_classification import TextClassification
from ..training.loop import make_accelerator, train
from .classifier import draw_batches, load_classifier, train_head
from .reproduction import Options, require, require_at_least
from .starts import adapted
from .subject import Subject, place

TARGETS = ["query", "value"]
Change = Callable[[Tensor, Tensor, torch.Generator], None]


@dataclass
class TrainingOptions(Options):
    """The options of trainings.

    Attributes:
        rank: of the adapters on query and value; the scaling is 1.
        steps, batch_size, length: of each training.
        head_steps: of the training of the head alone.
        calibration_batches: batches for the starts that read data.
        validation: held-out sentences on which losses are measured.
        rates: the learning rates, ascending; the search starts in the middle.
        repeats: seeds that are compared; each draws its own start and order of the data.
    """

    model: str = "minilm"
    rank: int = 8
    steps: int = 20
    batch_size: int = 8
    length: int = 24
    head_steps: int = 60
    calibration_batches: int = 32
    validation: int = 128
    rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    repeats: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "rank", "steps", "batch_size", "length", "head_steps")
        require_at_least(self, 1, "calibration_batches", "validation")
        require_at_least(self, 2, "repeats")
        ascending = len(self.rates) > 0 and sorted(set(self.rates)) == self.rates
        require(self, "rates", ascending and self.rates[0] > 0, "ascending numbers > 0")


@dataclass(frozen=True)
class Arm:
    """A start, and what an experiment changes in it.

    Attributes:
        setting: the value of `init_lora_weights`.
        rank: of this start; None takes the options'.
        change: called with A, B and a generator for each layer; it edits them in place.
        frozen: whether A is not trained.
    """

    setting: Any
    rank: int | None = None
    change: Change | None = None
    frozen: bool = False


class Classifier:
    """A model with a trained head, examples, and batches for starts that read data.

    Args:
        splits: the examples; None takes the film reviews.
    """

    def __init__(self, options: TrainingOptions, splits: Splits | None = None) -> None:
        self.options, self.device = options, place(options.device)
        self.subject: Subject = load_classifier(options.model, options.seed, self.device)
        self.task = TextClassification(self.subject.tokenizer, options.length)
        splits = splits or rotten_tomatoes.load(rotten_tomatoes.RottenTomatoes())
        self.examples, self.held_out = list(splits.train), splits.validation[: options.validation]
        train_head(self.subject, iter(self.batches(options.head_steps, 1)))
        self.learn = self.batches(options.calibration_batches, 2)

    def batches(self, count: int, offset: int) -> list[dict[str, Tensor]]:
        """Labeled training examples; each `offset` draws others."""
        return list(
            draw_batches(
                self.subject,
                self.examples,
                count=count,
                size=self.options.batch_size,
                length=self.options.length,
                seed=self.options.seed + offset,
                device=self.device,
            )
        )

    def calibrated(self, arms: Sequence[Arm], data: Any = None) -> Calibration | None:
        """The statistics that the starts of some arms need; `data` defaults to the examples."""
        configs = [self.configuration(arm) for arm in arms]
        driven = [one for one in configs if one.initializer()[0].needs_data]
        if not driven:
            return None
        return calibrate(self.subject.model, driven, self.learn if data is None else data)

    def configuration(self, arm: Arm) -> LoraConfig:
        rank = arm.rank or self.options.rank
        return LoraConfig(
            r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=arm.setting
        )

    @contextmanager
    def trained(
        self, arm: Arm, rate: float, seed: int, calibration: Calibration | None = None
    ) -> Iterator[LoraModel | None]:
        """The trained model while the context lasts; None if the training diverged.

        Raises:
            ConfigurationError: the method refuses the rank or the data.
        """
        config = self.configuration(arm)
        with adapted(self.subject.model, config, str(arm.setting), calibration, seed=seed) as model:
            apply_arm(model, arm, seed)
            yield model if self.train(model, rate, seed) else None

    def train(self, model: LoraModel, rate: float, seed: int) -> bool:
        """Train in place; False if the training diverged."""
        settings = TrainingConfig(
            steps=self.options.steps, batch_size=self.options.batch_size, learning_rate=rate
        )
        try:
            train(
                model,
                self.task,
                self.examples,
                settings,
                seed=seed,
                accelerator=make_accelerator(settings, self.options.device),
                record=lambda row: None,
            )
        except RunFailed as error:
            if error.reason != "diverged":
                raise
            return False
        return True

    def scored(
        self,
        arm: Arm,
        calibration: Calibration | None,
        rate: float,
        seed: int,
        measure: Callable[[LoraModel], dict[str, float]] | None = None,
    ) -> dict[str, float] | None:
        """Train, and measure (`scores` by default); None if the training diverged."""
        with self.trained(arm, rate, seed, calibration) as model:
            return None if model is None else (measure or self.scores)(model)

    @torch.no_grad()
    def scores(self, model: torch.nn.Module) -> dict[str, float]:
        """Mean loss in nats, and accuracy, of the held-out examples."""
        model.eval()
        rows = list(self.task.rows(model, self.held_out, 64, self.device))
        return {
            "loss": float(np.mean([row["loss"] for row in rows])),
            "accuracy": float(np.mean([row["correct"] for row in rows])),
        }


def apply_arm(model: LoraModel, arm: Arm, seed: int) -> None:
    """Change the factors of a start, and freeze A if the arm says so."""
    for name, layer in model.layers.items():
        if arm.change is not None:
            generator = layer_generator(seed, f"change of {name}")
            arm.change(layer.lora_A.data, layer.lora_B.data, generator)
        if arm.frozen:
            layer.lora_A.requires_grad_(False)
