"""What is measured besides the score, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.config.bounds import check_integer


@dataclass
class MeasuresConfig:
    """How much is measured. Not part of a run's identity: no measure changes the training.

    Attributes:
        update_every: steps between two sizes of the update; it is always measured at step 100 and
            at the end, with 0 only there.
        forgetting_texts: validation examples on which the original base and the trained model are
            compared; 0: none.
        intruder_layers: layers, evenly chosen, whose intruder dimensions are counted; null: all;
            0: none. Each takes a full singular value decomposition of its weight, of the order of
            10 out · in · min(out, in) operations.
        intruder_directions: leading directions of the trained weight that are looked at.
        spectra_layers: layers, evenly chosen, whose singular values are recorded.
    """

    update_every: int = 25
    forgetting_texts: int = 64
    intruder_layers: int | None = 8
    intruder_directions: int = 10
    spectra_layers: int = 4

    def __post_init__(self) -> None:
        for name in ("update_every", "forgetting_texts", "spectra_layers"):
            check_integer(f"measures.{name}", getattr(self, name), 0, fix="0 means none")
        check_integer("measures.intruder_layers", self.intruder_layers, 0, null="all layers")
        check_integer(
            "measures.intruder_directions", self.intruder_directions, 1,
            fix="measures.intruder_layers=0 turns this measure off",
        )  # fmt: skip


def spread(items: list[str], count: int | None) -> list[str]:
    """`count` of the items (None: all), evenly chosen: the middles of as many equal parts.

    Not the parts' beginnings: those would be the same kind of layer in every block of a model.
    """
    if count is None or count >= len(items):
        return items
    return [items[(2 * part + 1) * len(items) // (2 * count)] for part in range(count)]
