"""What a protocol sweep does: the settings under `hydra.sweeper`."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.config import bounds
from experiments.errors import ConfigurationError, nearest
from lora_init import list_initializers

SELECTORS = ("score", "loss")


@dataclass
class ProtocolConfig:
    """The fair protocol: each arm at its own learning rate, chosen on validation data.

    Attributes:
        methods: initializers to compare, by name; each is an arm.
        controls: of the config group `control`; each is a further arm.
        baseline: the arm the others are compared with.
        ranks: each arm runs at each; a learning rate is chosen per arm and rank.
        scaling: alpha / r, the same at every rank; None leaves `lora.lora_alpha` as it is.
        seeds: the same for every arm, so that differences are paired.
        learning_rate: the middle of an arm's first grid.
        learning_rates: the middle for the arms named here.
        grid: how many rates an arm begins with.
        per_decade: rates a decade.
        max_extensions: how many rates an arm may add beyond its grid, while its best is at an edge.
        select_by: the validation split's score, or its loss (where scores hardly differ).
        equal_update: compare at equal update size too: each arm at the rate at which its weights
            moved as far as the baseline's by step 100.
        dry_run: show the plan and stop.
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

    @property
    def arms(self) -> dict[str, str]:
        """Each arm's name and the override that makes it."""
        methods = {name: f"init={name}" for name in self.methods}
        return methods | {name: f"control={name}" for name in self.controls}

    def check(self) -> None:
        """Refuse what cannot work, by name.

        Raises:
            ConfigurationError: as said.
        """
        for name in ("methods", "ranks", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise refusal(name, values, "a list of one or more different values")
        known = [spec.name for spec in list_initializers()]
        for name in self.methods:
            if name not in known:
                must_be = f"one of {', '.join(known)}"
                raise refusal("methods", name, must_be, hint=nearest(name, known))
        for name in set(self.methods) & set(self.controls):
            raise refusal("controls", name, "names that are not among the methods")
        if self.baseline not in self.arms:
            raise refusal("baseline", self.baseline, f"one of {', '.join(self.arms)}")
        for name in self.learning_rates:
            if name not in self.arms:
                raise refusal("learning_rates", name, f"rates of {', '.join(self.arms)}")
        for rank in self.ranks:
            bounds.check_integer("hydra.sweeper.ranks", rank, 1)
        for seed in self.seeds:
            bounds.check_seed("hydra.sweeper.seeds", seed)
        for name, rate in {"": self.learning_rate, **self.learning_rates}.items():
            setting = f"learning_rates.{name}" if name else "learning_rate"
            bounds.check_number(f"hydra.sweeper.{setting}", rate, above=0)
        for name, least in (("grid", 1), ("per_decade", 1), ("max_extensions", 0)):
            bounds.check_integer(f"hydra.sweeper.{name}", getattr(self, name), least)
        bounds.check_number(
            "hydra.sweeper.scaling", self.scaling, above=0, null="lora.lora_alpha stays"
        )
        bounds.check_choice("hydra.sweeper.select_by", self.select_by, SELECTORS)
        bounds.check_switches("hydra.sweeper.", self, "equal_update", "dry_run")


def refusal(name: str, value: object, must_be: str, hint: str = "") -> ConfigurationError:
    told = f"hydra.sweeper.{name}={value} is not supported: must be {must_be}. {hint}"
    return ConfigurationError(told.strip())
