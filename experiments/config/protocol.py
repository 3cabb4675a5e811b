"""The settings of the fair protocol, under `hydra.sweeper`."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_init import list_initializers

from ..errors import nearest
from .bounds import (
    check_choice,
    check_integer,
    check_number,
    check_seed,
    check_switches,
    refusal,
)
from .location import PACKAGE

SELECTORS = ("score", "loss")


@dataclass
class ProtocolConfig:
    """The fair protocol: each arm at its own learning rate, chosen on validation data.

    Attributes:
        methods: initializers to compare, by name; each is an arm.
        controls: names of the config group `control`; each is a further arm.
        baseline: the arm that the others are compared with.
        ranks: every arm runs at each rank; a learning rate is chosen per arm and rank.
        scaling: alpha / r, the same at every rank; None keeps `lora.lora_alpha`.
        seeds: the same for every arm, so that differences are paired.
        learning_rate: the middle of an arm's first grid.
        learning_rates: the middle for the arms named here.
        grid: how many rates an arm starts with.
        per_decade: rates per decade.
        max_extensions: how many rates an arm may add beyond its grid while its best is at an edge.
        select_by: the validation split's score, or its loss (where scores hardly differ).
        equal_update: also compare at equal update size: each arm at the rate at which its weights
            moved as far as the baseline's by step 100.
        dry_run: show the plan and stop.
        application: the name of this package, which the plugin imports.
    """

    _target_: str = "hydra_plugins.lora_init_protocol.ProtocolSweeper"
    methods: list[str] = field(default_factory=lambda: ["kaiming"])
    controls: list[str] = field(default_factory=list)
    baseline: str = "kaiming"
    ranks: list[int] = field(default_factory=lambda: [8])
    scaling: float | None = 2.0
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    learning_rate: float = 1e-3
    learning_rates: dict[str, float] = field(default_factory=dict)
    grid: int = 5
    per_decade: int = 4
    max_extensions: int = 4
    select_by: str = "score"
    equal_update: bool = False
    dry_run: bool = False
    application: str = PACKAGE

    @property
    def arms(self) -> dict[str, str]:
        """Each arm's name and the override that makes it."""
        methods = {name: f"init={name}" for name in self.methods}
        return methods | {name: f"control={name}" for name in self.controls}

    def check(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            ConfigurationError: it names the setting.
        """
        prefix = "hydra.sweeper."
        for name in ("methods", "ranks", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise refusal(prefix + name, values, "a list of one or more different values")
        known = [method.name for method in list_initializers()]
        for name in self.methods:
            if name not in known:
                hint = nearest(name, known).strip("? ")
                raise refusal(f"{prefix}methods", name, f"one of {', '.join(known)}", hint)
        for name in set(self.methods) & set(self.controls):
            raise refusal(f"{prefix}controls", name, "names that are not among the methods")
        arms = ", ".join(self.arms)
        if self.baseline not in self.arms:
            raise refusal(f"{prefix}baseline", self.baseline, f"one of {arms}")
        for name, rate in self.learning_rates.items():
            if name not in self.arms:
                raise refusal(f"{prefix}learning_rates", name, f"rates of {arms}")
            check_number(f"{prefix}learning_rates.{name}", rate, above=0)
        check_number(f"{prefix}learning_rate", self.learning_rate, above=0)
        for rank in self.ranks:
            check_integer(f"{prefix}ranks", rank, 1)
        for seed in self.seeds:
            check_seed(f"{prefix}seeds", seed)
        for name, least in (("grid", 1), ("per_decade", 1), ("max_extensions", 0)):
            check_integer(prefix + name, getattr(self, name), least)
        check_number(f"{prefix}scaling", self.scaling, above=0, null="lora.lora_alpha stays")
        check_choice(f"{prefix}select_by", self.select_by, SELECTORS)
        check_switches(prefix, self, "equal_update", "dry_run")
