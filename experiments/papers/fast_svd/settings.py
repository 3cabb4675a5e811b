"""What is decomposed and trained; and the paper's own figures."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.papers.reproduction import PaperSettings

PAPER_SHARE = 128 / 4096
PAPER_ERRORS = {1: 1.93e-3, 16: 4.75e-4}
PAPER_SECONDS = {16: 22.67, None: 435.8}
PAPER_LOSSES = {1: 0.2301, 16: 0.2266, None: 0.2264}
"""Llama-2-7B, r = 128, by niter; None: the full SVD."""


@dataclass
class FastSvdSettings(PaperSettings):
    """Settings.

    Attributes:
        model: as of `subjects.load_subject`, a causal model.
        blocks: of the model, evenly spaced, whose matrices are decomposed.
        synthetic: the side of a synthetic square matrix with s_i = i^-0.7; None: without.
        ranks: measured beside the one that is judged.
        share: the judged rank as a share of the width; the paper's is 128 / 4096.
        niters: subspace iterations; 1 and 16 among them.
        rounds: how often each is decomposed, by another draw; times are medians.
        target_modules: what is adapted in training, at the judged rank, alpha = r.
        adapted_every: in the layers of every so many blocks of the model.
        starts: niter of the fine-tunings, 1 and 16 among them, beside the exact one.
        draws: fine-tunings of each of them, from different random blocks.
        steps, batch_size, length, learning_rate: of the fine-tunings on film plots.
        held_out: blocks of unseen plots, whose losses at the end are compared.
    """

    model: str = "smollm2"
    blocks: int = 1
    synthetic: int | None = 2048
    ranks: list[int] = field(default_factory=lambda: [128])
    share: float = PAPER_SHARE
    niters: list[int] = field(default_factory=lambda: [0, 1, 2, 4, 8, 16])
    rounds: int = 2
    target_modules: list[str] = field(
        default_factory=lambda: [
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
        ]
    )  # fmt: skip
    adapted_every: int = 1
    starts: list[int] = field(default_factory=lambda: [1, 16])
    draws: int = 2
    steps: int = 7
    batch_size: int = 2
    length: int = 64
    learning_rate: float = 2e-4
    held_out: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "blocks", "rounds", "adapted_every", "draws", "batch_size", "held_out",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed are integers >= 1")
        if self.synthetic is not None and self.synthetic < 64:
            raise ValueError(f"synthetic={self.synthetic}; allowed are integers >= 64, and null")
        if min(self.ranks, default=1) < 1:
            raise ValueError(f"ranks={self.ranks}; allowed are ranks >= 1")
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share}; allowed are shares 0 < x < 1 of the width")
        for name in ("niters", "starts"):
            given = getattr(self, name)
            if given != sorted(set(given)) or not {1, 16} <= set(given) or given[0] < 0:
                raise ValueError(
                    f"{name}={given}; allowed are ascending integers >= 0, 1 and 16 among them"
                )
        if self.steps < 2:
            raise ValueError(f"steps={self.steps}; allowed are integers >= 2")

    def judged_rank(self, width: int) -> int:
        return max(1, round(self.share * width))
