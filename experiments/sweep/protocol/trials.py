"""One trial of the protocol as Hydra overrides: an arm at a rank, a learning rate and a seed."""

from __future__ import annotations

from dataclasses import dataclass

from ...config.protocol import ProtocolConfig
from ...errors import ConfigurationError

SETTINGS = {
    "init": "hydra.sweeper.methods=[…]",
    "control": "hydra.sweeper.controls=[…]",
    "seed": "hydra.sweeper.seeds=[…]",
    "lora.r": "hydra.sweeper.ranks=[…]",
    "lora.lora_alpha": "hydra.sweeper.scaling=… (alpha / r), or hydra.sweeper.scaling=null",
    "training.learning_rate": "hydra.sweeper.learning_rate=…",
    "read_test": "nothing: the test set is read once the learning rates are chosen",
}
"""What the protocol sets for each run, and what to set instead."""


@dataclass(frozen=True)
class Entry:
    """An arm at a rank; each gets its own learning rate."""

    arm: str
    rank: int

    def label(self, settings: ProtocolConfig) -> str:
        """The arm's name, with the rank if there are several."""
        return self.arm if len(settings.ranks) == 1 else f"{self.arm} r={self.rank}"


@dataclass(frozen=True)
class Trial:
    """One run to be made."""

    entry: Entry
    rate: float
    seed: int

    def overrides(self, settings: ProtocolConfig, read_test: bool) -> list[str]:
        """What is appended to the overrides of the command line."""
        scaled = settings.scaling is not None
        return [
            settings.arms[self.entry.arm],
            f"lora.r={self.entry.rank}",
            *([f"lora.lora_alpha={settings.scaling * self.entry.rank:g}"] if scaled else []),
            f"training.learning_rate={self.rate:g}",
            f"seed={self.seed}",
            f"read_test={str(read_test).lower()}",
        ]


def entries(settings: ProtocolConfig) -> list[Entry]:
    return [Entry(arm, rank) for rank in settings.ranks for arm in settings.arms]


def trials(settings: ProtocolConfig, entry: Entry, rate: float) -> list[Trial]:
    """The runs of one setting: one per seed."""
    return [Trial(entry, rate, seed) for seed in settings.seeds]


def refuse_owned(keys: list[str], settings: ProtocolConfig) -> None:
    """Refuse overrides that the protocol would replace.

    Raises:
        ConfigurationError: one of them is given.
    """
    for key in keys:
        own = key != "lora.lora_alpha" or settings.scaling is not None
        if key in SETTINGS and own:
            raise ConfigurationError(f"{key}=… is set by the protocol; give {SETTINGS[key]}")
