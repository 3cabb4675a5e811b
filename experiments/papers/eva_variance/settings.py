"""What the reproduction of EVA's claims can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..reproduction import Options
from ..starts import UNCENTRED, check_methods

EVAS = ("eva", UNCENTRED)


@dataclass
class Data:
    """How much of its data a model sees.

    Attributes:
        batch_size, length: sequences a batch, and tokens a sequence (at most, for sentences).
        batches: of the calibration; as many again, of other films, are what it is held against.
        gradient_batches: of those, the first so many give the gradients.
        every: of how many transformer blocks the directions and gradients of one are measured; the
            ranks are chosen over all of them.
        moved: also the methods that change the model's function at step 0, whose gradients take
            passes of their own.
    """

    batch_size: int
    length: int
    batches: int
    gradient_batches: int
    every: int
    moved: bool

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "gradient_batches", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed are integers >= 1")
        if self.batches < 2:
            raise ValueError(f"batches={self.batches}; allowed are integers >= 2")
        if self.gradient_batches > self.batches:
            raise ValueError(
                f"gradient_batches={self.gradient_batches}; allowed are at most "
                f"batches={self.batches}"
            )


@dataclass
class EvaVarianceSettings(Options):
    """Settings.

    Attributes:
        models: as of `subjects.load_subject`; minilm is measured as a classifier of film reviews
            by `encoder`, every other one as a language model of film plots by `language`.
        rank: where one rank is compared.
        ranks: of the explained variance.
        rho: of the redistribution of ranks.
        orders: random orders of the calibration's batches, beside the one they come in.
        methods: registered names whose first gradients are compared; null for all that have one.
        cost_model: whose initializations are timed, on the layers of one of `cost_every` blocks.
        cost_batch: sequences a batch there.
        cost_steps: training steps timed, of which the median counts.
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
        if not self.models:
            raise ValueError("models=[]; allowed are one or more, such as smollm2")
        if not self.ranks or min(*self.ranks, self.rank) < 1:
            raise ValueError(f"ranks={self.ranks}, rank={self.rank}; allowed are integers >= 1")
        if self.rank not in self.ranks:
            raise ValueError(f"rank={self.rank}; allowed is one of ranks={self.ranks}")
        if self.rho < 1:
            raise ValueError(f"rho={self.rho}; allowed are numbers >= 1")
        for name in ("orders", "cost_every", "cost_batch", "cost_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed are integers >= 1")
        if self.methods is not None:
            check_methods(self.methods)
            if not {*EVAS, "kaiming"} <= set(self.methods):
                raise ValueError(
                    f"methods={self.methods}; {', '.join(EVAS)} and kaiming must be among them: "
                    "the claims compare them"
                )

    def data(self, model: str) -> Data:
        return self.encoder if model == "minilm" else self.language
