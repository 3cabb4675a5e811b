"""The models, grids and data of the reproduction."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..reproduction import Options, require

PAPERS_ITERATIONS = 5
"""LoftQ's default T, at which one iteration is compared with several."""


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
