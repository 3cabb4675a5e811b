"""What is measured, on which models, and how often: the schema of `conf/benchmark.yaml`.

Values are checked when the dataclasses are made; YAML is converted once, in `resolve`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import ConfigurationError, nearest

SECTION_NAMES = ("steps", "injection", "memory", "initialization")
TASKS = ("SEQ_CLS", "CAUSAL_LM")
ADAPTERS = ("lora", "dora")
METHODS = (
    "kaiming", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_1", "pissa_niter_2",
    "pissa_niter_4", "pissa_niter_16", "loftq", "corda", "eva",
)  # fmt: skip


@dataclass
class ModelSettings:
    """One model and the batches of its training step.

    Attributes:
        source: "minilm", "smollm2", or a folder or hub name that transformers loads. None is a
            place for a model that the command line may name.
        task: "SEQ_CLS" (sentences padded to `tokens`) or "CAUSAL_LM" (text without padding).
        batch_size, tokens: the shape of a batch.
        targets: by adapter, "lora" and "dora", the least speed ratio that a step should reach.
    """

    source: str | None = None
    task: str = "CAUSAL_LM"
    batch_size: int = 16
    tokens: int = 48
    targets: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("models.*.task", self.task, TASKS)
        at_least("models.*.batch_size", self.batch_size, 1)
        at_least("models.*.tokens", self.tokens, 2)
        for adapter in self.targets:
            one_of("a key of models.*.targets", adapter, ADAPTERS)


@dataclass
class StepsSettings:
    """Rounds of one step by each contender; the first `warmup` are dropped."""

    models: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=lambda: list(ADAPTERS))
    rounds: int = 30
    warmup: int = 5
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        for adapter in self.adapters:
            one_of("steps.adapters", adapter, ADAPTERS)
        at_least("steps.rounds", self.rounds, 2)
        at_least("steps.warmup", self.warmup, 0)
        if not self.learning_rate > 0:
            raise ValueError(f"steps.learning_rate={self.learning_rate!r}; allowed is above 0")


@dataclass
class InjectionSettings:
    """Repetitions on fresh copies of the model; one more comes first and is dropped."""

    models: list[str] = field(default_factory=list)
    repetitions: int = 7

    def __post_init__(self) -> None:
        at_least("injection.repetitions", self.repetitions, 2)


@dataclass
class MemorySettings:
    """Initializers whose injection is measured, each in a process of its own."""

    models: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    time_limit: float = 300.0

    def __post_init__(self) -> None:
        for method in self.methods:
            one_of("memory.methods", method, METHODS)
        at_least("memory.time_limit", self.time_limit, 1)


@dataclass
class InitializationSettings:
    """Methods, each in a process of its own.

    Attributes:
        repetitions: on fresh copies of the model; below five pairs an interval promises too much.
        sentences, batch_size: the calibration set of corda and eva.
        time_limit: seconds for a method, both contenders together.
        exclude: by method, a regular expression of modules that both leave out, because PEFT
            fails on them.
    """

    models: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    repetitions: int = 5
    sentences: int = 512
    batch_size: int = 32
    time_limit: float = 600.0
    exclude: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for method in (*self.methods, *self.exclude):
            one_of("initialization.methods and the keys of exclude", method, METHODS)
        at_least("initialization.repetitions", self.repetitions, 1)
        at_least("initialization.sentences", self.sentences, 1)
        at_least("initialization.batch_size", self.batch_size, 1)
        at_least("initialization.time_limit", self.time_limit, 1)


@dataclass
class BenchmarkConfig:
    """The whole benchmark. `threads` None leaves the choice to torch; it is the same for all."""

    sections: list[str] = field(default_factory=lambda: list(SECTION_NAMES))
    models: dict[str, ModelSettings] = field(default_factory=dict)
    steps: StepsSettings = field(default_factory=StepsSettings)
    injection: InjectionSettings = field(default_factory=InjectionSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    initialization: InitializationSettings = field(default_factory=InitializationSettings)
    rank: int = 8
    alpha: float = 16.0
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    outputs: str = "outputs"

    def __post_init__(self) -> None:
        for section in self.sections:
            one_of("sections", section, SECTION_NAMES)
            for name in getattr(self, section).models:
                one_of(f"{section}.models", name, tuple(self.models))
                if self.models[name].source is None:
                    raise ValueError(
                        f"models.{name}.source is not set, but {section}.models has {name!r}; give "
                        "a folder or a hub name that transformers loads"
                    )
        at_least("rank", self.rank, 1)
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha!r}; allowed is above 0")
        if self.threads is not None:
            at_least("threads", self.threads, 1)
        one_of("device", self.device, ("cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda', but torch sees no CUDA device; use device=cpu")


def one_of(setting: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{setting}: {value!r}; {nearest(str(value), allowed)}allowed are {', '.join(allowed)}"
        )


def at_least(setting: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{setting}={value!r}; allowed is {least} or more")


def register_schema() -> None:
    ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)


def resolve(composed: DictConfig) -> BenchmarkConfig:
    """Hydra's composition as plain dataclasses.

    Raises:
        ConfigurationError: a value that is not allowed.
    """
    try:
        settings = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigurationError(str(error).splitlines()[0]) from error
    except ValueError as error:  # from a __post_init__
        raise ConfigurationError(str(error)) from error
    assert isinstance(settings, BenchmarkConfig)
    return settings


def to_plain(settings: BenchmarkConfig) -> dict[str, Any]:
    return asdict(settings)


def from_plain(values: dict[str, Any]) -> BenchmarkConfig:
    """The inverse of `to_plain`, for a process that was handed its settings as JSON."""
    return resolve(OmegaConf.merge(OmegaConf.structured(BenchmarkConfig), values))
