"""What the reproduction of LoRA-GA's first step can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.papers.reproduction import Options
from experiments.papers.starts import check_methods


@dataclass
class Data:
    """How much of its data a model sees.

    Attributes:
        batch_size, length: sequences a batch, and tokens a sequence (at most, for sentences).
        calibration: sequences that data-driven methods are calibrated on.
        fresh: batches of as many other sequences, of other films.
        sizes: LoRA-GA is calibrated on so many sequences, too.
        every: of how many transformer blocks one is measured.
        moved: also the methods that change the model's function at step 0, whose gradients take
            passes of their own.
    """

    batch_size: int
    length: int
    calibration: int
    fresh: int
    sizes: list[int]
    every: int
    moved: bool

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "calibration", "fresh", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed are integers >= 1")
        if self.calibration > self.batch_size and self.calibration % self.batch_size:
            raise ValueError(
                f"calibration={self.calibration}; allowed are multiples of batch_size="
                f"{self.batch_size}, and less than one batch"
            )
        if any(size < 1 for size in self.sizes):
            raise ValueError(f"sizes={self.sizes}; allowed are integers >= 1")


@dataclass
class FirstStepSettings(Options):
    """Settings.

    Attributes:
        models: as of `subjects.load_subject`; minilm is measured as a classifier of film reviews
            by `encoder`, every other one as a language model of film plots by `language`.
        rank: of all methods.
        methods: registered names; null for all that start a linear layer.
    """

    models: list[str] = field(default_factory=lambda: ["minilm", "smollm2"])
    rank: int = 8
    methods: list[str] | None = None
    encoder: Data = field(default_factory=lambda: Data(32, 48, 32, 3, [8, 128], 1, True))
    language: Data = field(default_factory=lambda: Data(4, 64, 8, 2, [2, 16], 5, False))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise ValueError("models=[]; allowed are one or more, such as minilm")
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}; allowed are integers >= 1")
        if self.methods is not None:
            check_methods(self.methods)
            if "lora_ga" not in self.methods or len(self.methods) < 2:
                raise ValueError(
                    f"methods={self.methods}; allowed are two or more with lora_ga among them: the "
                    "claim is about lora_ga beside others"
                )

    def data(self, model: str) -> Data:
        return self.encoder if model == "minilm" else self.language
