"""What the reproduction can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..reproduction import Options

PAPERS_ITERATIONS = 5
"""LoftQ's default T, at which one iteration is compared with several."""


@dataclass
class LoftqIterationsSettings(Options):
    """Settings.

    Attributes:
        encoder, language_model: the grid runs on the first, perplexity on the second.
        bits, ranks: of the encoder's grid; 2 and 4 bits are among them, and 8 bits, where little is
            lost, are measured at the largest rank only.
        iterations: T of LoftQ there, from 1 on.
        order_iterations: T at which the alternation is begun with an SVD, too; some of the above.
        sentences, held_out_sentences: reviews that QERA is calibrated on, and that errors are
            measured on.
        sentence_length: tokens of a review, longer ones are cut.
        encoder_every: quantise the layers of every n-th block.
        language_bits, language_ranks, language_iterations: the shorter lists of the language model.
        tokens, held_out_tokens, block_length: film plots for calibration and for measuring.
        language_every: quantise the layers of every n-th block.
        measured_every: and measure their own errors on those of every n-th.
        training_steps, training_batch, learning_rate: of the fine-tuning from 2 bits, on reviews;
            the head is trained with the adapter.
        training_seeds: orders of the data; at least two.
        validation_sentences: that the fine-tuned encoders are compared on.
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
            chosen = set(getattr(self, name))
            if not needed <= chosen <= {2, 4, 8}:
                raise ValueError(
                    f"{name}={getattr(self, name)}; allowed are 2, 4 and 8, with "
                    f"{' and '.join(map(str, sorted(needed)))} among them"
                )
        for name in ("ranks", "language_ranks", "language_iterations", "order_iterations"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed are integers >= 1")
        early = {t for t in self.iterations if t <= PAPERS_ITERATIONS}
        if min(self.iterations, default=0) != 1 or len(early) < 2:
            raise ValueError(
                f"iterations={self.iterations}; allowed are integers >= 1, with 1 and another one "
                f"up to {PAPERS_ITERATIONS} among them"
            )
        if not set(self.order_iterations) <= set(self.iterations):
            raise ValueError(
                f"order_iterations={self.order_iterations}; allowed are those of iterations="
                f"{self.iterations}"
            )
        if len(set(self.training_seeds)) < 2:
            raise ValueError(
                f"training_seeds={self.training_seeds}; allowed are two different ones or more"
            )
