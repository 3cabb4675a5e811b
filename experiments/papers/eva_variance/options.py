"""The models, data and methods of the reproduction."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..reproduction import Options, require, require_at_least
from ..starts import UNCENTRED, check_methods

EVAS = ("eva", UNCENTRED)


@dataclass
class Data:
    """How much data a model sees.

    Attributes:
        batch_size, length: sequences per batch, and tokens per sequence (at most, for sentences).
        batches: of the calibration. As many batches of other films test it.
        gradient_batches: the first so many of the test's batches give the gradients.
        every: directions and gradients are measured in one of so many blocks; ranks are chosen
            over all blocks.
        moved: also measure methods that change the model's function at step 0. Their gradients
            take passes of their own.
    """

    batch_size: int
    length: int
    batches: int
    gradient_batches: int
    every: int
    moved: bool

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "length", "gradient_batches", "every")
        require_at_least(self, 2, "batches")
        fits = self.gradient_batches <= self.batches
        require(self, "gradient_batches", fits, f"at most batches={self.batches}")


@dataclass
class EvaVarianceOptions(Options):
    """What is measured.

    Attributes:
        models: as `load_subject` takes them. minilm is measured as a classifier of film reviews
            with `encoder`, others as language models of film plots with `language`.
        rank: the rank of comparisons at one rank.
        ranks: the ranks of the explained variance.
        rho: limits the redistribution of ranks.
        orders: random orders of the calibration's batches, in addition to the given order.
        methods: registered names whose first gradients are compared; null for all that have one.
        cost_model: the model whose starts are timed, on the layers of one of `cost_every` blocks.
        cost_batch: sequences per batch there.
        cost_steps: the number of timed training steps, of which the median counts.
    """

    models: list[str] = field(default_factory=lambda: ["smollm2", "minilm"])
    rank: int = 16
    ranks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    rho: float = 2.0
    orders: int = 3
    methods: list[str] | None = None
    language: Data = field(default_factory=lambda: Data(4, 64, 16, 4, 6, False))
    encoder: Data = field(default_factory=lambda: Data(4, 48, 90, 8, 1, True))
    cost_model: str = "minilm"
    cost_every: int = 1
    cost_batch: int = 16
    cost_steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "models", bool(self.models), "one or more, such as smollm2")
        require(self, "ranks", min(self.ranks, default=0) >= 1, "integers >= 1")
        require(self, "rank", self.rank in self.ranks, f"one of ranks={self.ranks}")
        require(self, "rho", self.rho >= 1, "a number >= 1")
        require_at_least(self, 1, "orders", "cost_every", "cost_batch", "cost_steps")
        if self.methods is not None:
            check_methods(self.methods)
            require(
                self,
                "methods",
                {*EVAS, "kaiming"} <= set(self.methods),
                f"a list with {', '.join(EVAS)} and kaiming, which the claims compare",
            )

    def data(self, model: str) -> Data:
        """The amount of data of one model."""
        return self.encoder if model == "minilm" else self.language
