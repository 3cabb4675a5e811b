"""The typed schema of a run, and the schemas that Hydra checks every YAML against.

A run is one `RunConfig`. Each group's YAML (`conf/init/pissa.yaml`, …) starts from a schema
registered here, so that a misspelt key or a wrong type is refused by name when the configuration is
composed. A method's schema comes from the options that it registered with the library: a third
party's method has one as soon as its package is installed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import II, MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import data, models
from experiments.config.bounds import (
    check_choice,
    check_integer,
    check_names,
    check_number,
    check_seed,
    check_switches,
)
from experiments.config.controls import check_control
from experiments.config.launchers import register_launchers
from experiments.config.names import check_name, check_outputs, sweep_path
from experiments.config.resolve import as_settings
from experiments.data import DataConfig
from experiments.data.calibration_texts import CalibrationConfig
from experiments.measures import MeasuresConfig
from experiments.models import ModelConfig
from experiments.run.budget import BudgetConfig
from experiments.run.tracking import TrackingConfig
from experiments.sweep.protocol.settings import ProtocolConfig
from experiments.training.schedule import TrainingConfig, steps_of
from lora_init import list_initializers
from lora_init.registry import Initializer


@dataclass
class InitConfig:
    """The initializer's registered name; the subclass of each method adds its options."""

    name: str = MISSING


@dataclass
class LoraSettings:
    """The adapter: the fields of `lora_init.LoraConfig` that are the same for every method."""

    r: int = 8
    lora_alpha: float = 16
    target_modules: Any = "all-linear"
    exclude_modules: Any = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | None = None
    layers_pattern: Any = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integer("lora.r", self.r, 1)
        check_number("lora.lora_alpha", self.lora_alpha, above=0)
        check_number("lora.lora_dropout", self.lora_dropout, least=0, below=1)
        layers = 'Give the names of layers, such as [q_proj,v_proj], or "all-linear"'
        check_names("lora.target_modules", self.target_modules, null="the model's own", fix=layers)
        for name in ("exclude_modules", "layers_pattern", "modules_to_save"):
            check_names(f"lora.{name}", getattr(self, name), null="none")
        check_switches("lora.", self, "use_rslora", "use_dora", "lora_bias")
        for name, rank in self.rank_pattern.items():
            check_integer(f"lora.rank_pattern.{name}", rank, 1)
        for name, alpha in self.alpha_pattern.items():
            check_number(f"lora.alpha_pattern.{name}", alpha, above=0)


@dataclass
class Seeds:
    """One seed for each source of chance; all of them are `seed` unless set."""

    init: int = II("seed")
    data: int = II("seed")
    calibration: int = II("seed")
    head: int = II("seed")


MOST_THREADS = 1024
"""Some machines end a process that starts many thousands."""


@dataclass
class Runtime:
    """How a run is executed. Not part of its identity: it changes speed and rounding only.

    Attributes:
        device: "auto" takes an accelerator if there is one; "cpu" does not.
        threads: CPU threads; None leaves the choice to torch.
        rerun: run again what has already finished.
        cache: take decompositions and statistics from the user's cache, and keep them there. Off
            where the cost of a start is what is compared.
        checkpoint_minutes, checkpoint_every: save the training when so many minutes have passed, or
            after so many steps; None: not for that reason.
        micro_batch_size: examples of one forward and backward pass of a process; their gradients
            are added up to the batch's. None: the whole batch at once.
        gradient_checkpointing: keep less of the forward pass, and compute it again in the backward
            pass: a third more time for much less memory.
        calibration_gib: memory for the second moments of the inputs (EVA, CorDA, QERA); where they
            are more, they are collected in several passes. None: all at once.
        time_limit_minutes: stop after so long, with a checkpoint; the same command goes on from it.
            Of one process, initialization and all; None: no limit.
    """

    device: str = "auto"
    threads: int | None = None
    rerun: bool = False
    cache: bool = True
    checkpoint_minutes: float | None = 5.0
    checkpoint_every: int | None = None
    time_limit_minutes: float | None = None
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False
    calibration_gib: float | None = None

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "micro_batch_size"):
            check_integer(f"runtime.{name}", getattr(self, name), 1, null="none")
        for name in ("checkpoint_minutes", "time_limit_minutes", "calibration_gib"):
            check_number(f"runtime.{name}", getattr(self, name), above=0, null="none")
        check_integer(
            "runtime.threads", self.threads, 1, MOST_THREADS, null="torch chooses",
            fix="More threads than cores make a run slower",
        )  # fmt: skip
        check_switches("runtime.", self, "rerun", "cache", "gradient_checkpointing")
        check_choice(
            "runtime.device", self.device, ("auto", "cpu"),
            fix="CUDA_VISIBLE_DEVICES chooses an accelerator, and `accelerate launch -m "
            "experiments.train …` uses several",
        )  # fmt: skip


@dataclass
class Paths:
    """Where results go: runs to `<outputs>/runs`, manifests of sweeps to `<outputs>/sweeps`."""

    outputs: str = "outputs"

    def __post_init__(self) -> None:
        check_outputs(self.outputs)


@dataclass
class RunConfig:
    """One run, completely. Its identity derives from this and nothing else.

    Attributes:
        read_test: score the trained model on the test set. False leaves the test set unread, for a
            setting that may not be chosen; asked for again with True, the finished run is scored
            then, and trained only once. Not part of the identity.
    """

    init: InitConfig = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    training: TrainingConfig = MISSING
    tracking: TrackingConfig = MISSING
    lora: LoraSettings = field(default_factory=LoraSettings)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    control: str = "none"
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    measures: MeasuresConfig = field(default_factory=MeasuresConfig)
    seed: int = 0
    seeds: Seeds = field(default_factory=Seeds)
    sweep: str = "default"
    read_test: bool = True
    runtime: Runtime = field(default_factory=Runtime)
    paths: Paths = field(default_factory=Paths)

    def __post_init__(self) -> None:
        check_name("sweep", self.sweep)
        check_seed("seed", self.seed)
        for source in fields(Seeds):
            check_seed(f"seeds.{source.name}", getattr(self.seeds, source.name))
        check_switches("", self, "read_test")


def init_schema(method: Initializer) -> type:
    """A dataclass of a method's name and options, for OmegaConf to check YAML against."""
    hints = get_type_hints(method.options)
    made = [("name", str, field(default=method.name))]
    for option in fields(method.options):
        given = asdict(method.options())[option.name]
        # OmegaConf cannot express some types (Literal, say). Such an option's name is still
        # checked here, its value by the method's own dataclass.
        kind = hints[option.name] if expressible(hints[option.name], given) else Any
        made.append((option.name, kind, field(default_factory=lambda given=given: given)))
    return make_dataclass(f"{method.name}_init", made, bases=(InitConfig,))


def expressible(kind: Any, default: Any) -> bool:
    probe = make_dataclass("probe", [("option", kind, field(default_factory=lambda: default))])
    try:
        OmegaConf.structured(probe)
    except OmegaConfBaseException:
        return False
    return True


def register_schemas() -> None:
    """Put every schema into Hydra's ConfigStore, under `schema/` in its group."""
    register_launchers()
    OmegaConf.register_new_resolver("steps_of", steps_of, replace=True)
    OmegaConf.register_new_resolver(
        "sweep_path", lambda outputs, sweep: str(sweep_path(outputs, sweep)), replace=True
    )
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for method in list_initializers():
        store.store(group="init/schema", name=method.name, node=init_schema(method))
    for group, sources in (("model", models.SOURCES), ("data", data.SOURCES)):
        for source in sources:
            # The schema is named after the module: model/schema/minilm, data/schema/table.
            name = source.__module__.rpartition(".")[2]
            store.store(group=f"{group}/schema", name=name, node=source)
    store.store(group="training/schema", name="training", node=TrainingConfig)
    store.store(group="tracking/schema", name="tracking", node=TrackingConfig)
    store.store(group="hydra/sweeper", name="protocol", node=ProtocolConfig)


def resolve(composed: DictConfig) -> RunConfig:
    """Hydra's composition as the run it describes.

    Raises:
        ConfigurationError: a mandatory setting left out, or a value its dataclass refuses.
    """
    run = as_settings(composed, RunConfig)
    check_control(run)
    return run
