"""The models, layers and ranks that are measured, and the paper's own figures."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

from ..reproduction import Options, require, require_at_least

METHODS = {"loftq": "loftq_iter", "qpissa": "iterations"}
"""The initializer's option that holds T, by initializer."""
SHOWN = {"loftq": "loftq", "qpissa": "pissa"}
"""The names in the paper, which also choose the charts' colors."""

PAPER_SHARE = 128 / 4096
PAPER_AVERAGES = {
    ("Llama-2-7B", 128, 4096): {
        1: {"loftq": 6.6, "pissa": 10.7},
        5: {"loftq": 14.6, "pissa": 19.4},
    },
    ("Llama-3-8B", 64, 4096): {1: {"loftq": 5.3, "pissa": 7.7}, 5: {"loftq": 11.2, "pissa": 14.3}},
}
"""Reduction of the nuclear norm in percent, by (model, rank, width) and T."""
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
class PissaQuantizationOptions(Options):
    """What is measured.

    Attributes:
        models: as `load_subject` takes them.
        blocks: the number of evenly spaced blocks of each model, or a few more if they do not
            divide; None means all. All claims are judged on them, at one rank.
        detailed: so many of these blocks are also measured at the other ranks and in the controls.
        ranks: measured in addition to the rank that is judged.
        share: the judged rank as a share of the model's width; the paper's is 128 / 4096.
        iterations: T.
        tokens, length: of the calibration text: film plots, or reviews for an encoder.
        controls: also measure weights that were put on a 4-bit grid, or taken off their grid.
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
        require(self, "models", bool(self.models), "one model or more")
        fits = self.blocks is None or self.blocks >= 1
        require(self, "blocks", fits, "an integer >= 1, or null")
        require_at_least(self, 1, "detailed")
        require(self, "ranks", min(self.ranks, default=0) >= 1, "one or more ranks >= 1")
        require(self, "share", 0 < self.share < 1, "a share 0 < x < 1 of the width")
        ascending = all(one < next_one for one, next_one in pairwise(self.iterations))
        several = len(self.iterations) > 1 and self.iterations[0] >= 1
        require(self, "iterations", several and ascending, "two or more T >= 1, ascending")

    def judged_rank(self, width: int) -> int:
        """The rank that claims are judged at, for a model of this width."""
        return max(1, round(self.share * width))
