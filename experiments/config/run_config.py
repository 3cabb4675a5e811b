"""The configuration of one run, as a typed dataclass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import II, MISSING

from lora_init import list_initializers

from ..errors import ConfigurationError
from .bounds import (
    check_choice,
    check_integer,
    check_names,
    check_number,
    check_seed,
    check_switches,
)
from .inputs import CalibrationConfig, DataConfig, ModelConfig
from .names import check_name, check_outputs
from .records import MeasuresConfig, TrackingConfig
from .training import BudgetConfig, TrainingConfig

MOST_THREADS = 1024
"""Some machines kill a process that starts many thousands of threads."""


@dataclass
class InitConfig:
    """The initializer's registered name; each method's subclass adds its options."""

    name: str = MISSING


@dataclass
class LoraSettings:
    """The adapter: the fields of `lora_init.LoraConfig` that do not depend on the method."""

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
    """One seed for each source of randomness; each equals `seed` unless it is set."""

    init: int = II("seed")
    data: int = II("seed")
    calibration: int = II("seed")
    head: int = II("seed")


@dataclass
class Runtime:
    """How a run is executed. Not part of its identity: only speed and rounding change.

    Attributes:
        device: "auto" uses an accelerator if there is one; "cpu" does not.
        threads: CPU threads; None lets torch choose.
        rerun: repeat a run that has finished.
        cache: use the user's cache for decompositions and statistics. Turn it off to compare
            what the starts cost.
        checkpoint_minutes, checkpoint_every: save the training after this many minutes, or after
            this many steps; None turns either off.
        micro_batch_size: examples per forward and backward pass of a process, whose gradients
            are summed to the batch's; None takes the whole batch at once.
        gradient_checkpointing: recompute activations in the backward pass: more time for less
            memory.
        calibration_gib: memory for the second moments of the inputs (EVA, CorDA, QERA). Moments
            that need more are collected in several passes; None collects all at once.
        time_limit_minutes: stop a process after this long, with a checkpoint; the same command
            continues from it. None sets no limit.
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
    """One run, completely. The run's identity is derived from this and nothing else.

    Attributes:
        control: what the run isolates, by name (`conf/control/`); "none" for an ordinary run.
        read_test: score the trained model on the test set. False leaves the test set unread while
            settings are being chosen; the same run with True is then scored without training it
            again. Not part of the identity.
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


CONTROLS: dict[str, tuple[str, Callable[[RunConfig], bool]]] = {
    "rslora": ("lora.use_rslora=true", lambda run: run.lora.use_rslora),
    "lora_plus": ("training.lora_plus_ratio=16", lambda run: run.training.lora_plus_ratio != 1),
}
"""Controls that are a setting: what `conf/control/` sets, and whether a run has such a setting."""


def control_methods() -> list[str]:
    return [method.name for method in list_initializers() if method.control]


def check_control(run: RunConfig) -> None:
    """Refuse a control that contradicts the run's settings, since results carry its name.

    Raises:
        ConfigurationError: the name is unknown, or an override changed what the control sets.
    """
    known = ["none", *CONTROLS, *control_methods()]
    check_choice("control", run.control, known)
    setting, holds = CONTROLS.get(run.control, ("", None))
    if holds is not None and not holds(run):
        raise ConfigurationError(
            f"control={run.control} means {setting} or similar, and another override changed that. "
            "Leave that override out, or set control=none."
        )
    if run.control in control_methods() and run.init.name != run.control:
        raise ConfigurationError(
            f"control={run.control} means init={run.control}, and init={run.init.name} is given. "
            "Leave init out, or set control=none."
        )


def control_of(run: RunConfig) -> str:
    """The control's name for the result, also if a control method was chosen by init=…"""
    own_method = run.control == "none" and run.init.name in control_methods()
    return run.init.name if own_method else run.control
