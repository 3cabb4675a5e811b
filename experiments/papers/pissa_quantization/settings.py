"""What is measured on which models; and the paper's own figures."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

from ..reproduction import Options

METHODS = {"loftq": "loftq_iter", "qpissa": "iterations"}
"""By initializer, what it calls T."""
SHOWN = {"loftq": "loftq", "qpissa": "pissa"}
"""As the paper and the charts' colours call them."""

PAPER_SHARE = 128 / 4096
PAPER_AVERAGES = {
    ("Llama-2-7B", 128, 4096): {
        1: {"loftq": 6.6, "pissa": 10.7},
        5: {"loftq": 14.6, "pissa": 19.4},
    },
    ("Llama-3-8B", 64, 4096): {1: {"loftq": 5.3, "pissa": 7.7}, 5: {"loftq": 11.2, "pissa": 14.3}},
}
"""Nuclear norm, per cent, by (model, rank, width) and T."""
PAPER_PARTS = {
    "Q": ((4096, 4096), 8.1, 19.0),
    "K": ((4096, 4096), 8.1, 18.1),
    "V": ((4096, 4096), 7.2, 8.9),
    "O": ((4096, 4096), 7.3, 8.9),
    "gate": ((11008, 4096), 5.3, 8.2),
    "up": ((11008, 4096), 5.1, 5.9),
    "down": ((4096, 11008), 5.1, 6.0),
}
"""Llama-2-7B, r = 128, T = 1: shape, LoftQ, PiSSA."""

PARTS = {
    "Q": r"q_proj|query",
    "K": r"k_proj|key",
    "V": r"v_proj|value",
    "O": r"o_proj|attention\.output\.dense",
    "gate": r"gate_proj",
    "up": r"up_proj|intermediate\.dense",
    "down": r"down_proj|output\.dense",
}
"""The paper's names of a block's layers, and those of the models; the first that fits counts."""
MLP = ("gate", "up", "down")


def part_of(kind: str) -> str:
    """The paper's name of a kind of layer; the model's own where the paper has none."""
    return next((part for part, names in PARTS.items() if re.search(names, kind)), kind)


@dataclass
class PissaQuantizationSettings(Options):
    """Settings.

    Attributes:
        models: as of `subjects.load_subject`.
        blocks: of each model, evenly spaced (or a few more, where they do not divide); None: all.
            All claims are judged on them, at one rank.
        detailed: so many of these blocks are measured at the other ranks and in the controls, too.
        ranks: measured beside the one that is judged.
        share: the judged rank as a share of the model's width; the paper's is 128 / 4096.
        iterations: T.
        tokens, length: of the calibration text: film plots, reviews for an encoder.
        controls: also measure the weights put on a 4-bit grid, or taken off the one they are on.
    """

    models: list[str] = field(default_factory=lambda: ["minilm", "smollm2"])
    blocks: int | None = 6
    detailed: int = 2
    ranks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128])
    share: float = PAPER_SHARE
    iterations: list[int] = field(default_factory=lambda: [1, 5])
    tokens: int = 4096
    length: int = 128
    controls: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise ValueError("models=[]; name one model or more")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks={self.blocks}; allowed are integers >= 1, and null")
        if self.detailed < 1:
            raise ValueError(f"detailed={self.detailed}; allowed are integers >= 1")
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks={self.ranks}; allowed are one or more ranks >= 1")
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share}; allowed are shares 0 < x < 1 of the width")
        ascending = all(one < next_one for one, next_one in pairwise(self.iterations))
        if len(self.iterations) < 2 or self.iterations[0] < 1 or not ascending:
            raise ValueError(
                f"iterations={self.iterations}; allowed are two or more T >= 1, ascending"
            )

    def judged_rank(self, width: int) -> int:
        return max(1, round(self.share * width))
