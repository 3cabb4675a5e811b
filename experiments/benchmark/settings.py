"""What is measured, on which models, and how often: the schema of `conf/benchmark.yaml`.

Values are checked when the dataclasses are made; YAML is converted once, in `resolve`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from experiments.benchmark.strategies import METHODS
from experiments.config.resolve import as_settings
from experiments.errors import nearest

SECTION_NAMES = ("initialization", "calibration", "injection", "memory", "steps")
TASKS = ("SEQ_CLS", "CAUSAL_LM")
ADAPTERS = ("lora", "dora")
CALIBRATIONS = ("all_linear", "q_and_v")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class LlamaShape:
    """The sizes of a Llama with power-law weights."""

    layers: int = 1
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    key_value_heads: int = 4
    vocabulary: int = 720
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "intermediate", "heads", "key_value_heads", "vocabulary"):
            at_least(f"models.*.llama.{name}", getattr(self, name), 1)
        one_of("models.*.llama.dtype", self.dtype, DTYPES)


@dataclass
class LayerShape:
    """The sizes of a single linear layer with a power-law weight: (out, in)."""

    rows: int = 4096
    columns: int = 4096

    def __post_init__(self) -> None:
        at_least("models.*.layer.rows", self.rows, 2)
        at_least("models.*.layer.columns", self.columns, 2)


@dataclass
class ModelSettings:
    """One model and its batches.

    Attributes:
        source: "minilm", "smollm2", or a folder or hub name that transformers loads. Where it,
            `llama` and `layer` are None, this is a place that the command line may fill.
        llama, layer: a synthetic model instead.
        task: "SEQ_CLS" (sentences padded to `tokens`) or "CAUSAL_LM" (text without padding).
        batch_size, tokens: the shape of a batch of a training step.
        rows, row_tokens: the shape of a calibration batch, of running text.
        batches: calibration batches of the section `initialization`.
        ranks: that the section `initialization` measures.
        share: of the seconds that the models still to come may take, beside theirs.
        optional: strategies are left out, with a row that says so, once that share is used up.
        peft, exact: strategies that PEFT and torch.linalg take part in; None: all.
        targets: the least ratio that a training step ("lora", "dora") or a strategy should reach;
            for "eva" and a calibration pass ("all_linear", "q_and_v") the most that ours may
            cost, in units of the plain forward passes.
    """

    source: str | None = None
    llama: LlamaShape | None = None
    layer: LayerShape | None = None
    task: str = "CAUSAL_LM"
    batch_size: int = 16
    tokens: int = 48
    rows: int = 4
    row_tokens: int = 512
    batches: int = 8
    ranks: list[int] = field(default_factory=lambda: [8])
    share: float = 1.0
    optional: bool = False
    peft: list[str] | None = None
    exact: list[str] | None = None
    targets: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("models.*.task", self.task, TASKS)
        for name in ("batch_size", "rows", "batches"):
            at_least(f"models.*.{name}", getattr(self, name), 1)
        at_least("models.*.tokens", self.tokens, 2)
        at_least("models.*.row_tokens", self.row_tokens, 2)
        if not self.share > 0:
            raise ValueError(f"models.*.share={self.share!r}; allowed is above 0")
        for rank in self.ranks:
            at_least("models.*.ranks", rank, 1)
        for method in (*(self.peft or ()), *(self.exact or ())):
            one_of("models.*.peft and models.*.exact", method, METHODS)
        for name in self.targets:
            one_of("a key of models.*.targets", name, (*ADAPTERS, *CALIBRATIONS, *METHODS))
        kinds = [kind for kind in ("source", "llama", "layer") if getattr(self, kind) is not None]
        if len(kinds) > 1:
            raise ValueError(f"models.*: {' and '.join(kinds)} are set; a model is one of them")

    @property
    def present(self) -> bool:
        return self.source is not None or self.llama is not None or self.layer is not None


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
    """Strategies on every model, each model in a process of its own.

    Attributes:
        repetitions: at most so many calls of a contender, on fresh copies of the model.
        budget: seconds after which a contender takes no further turn: one turn at least.
        time_limit: seconds for a single call; by method, `limits` are others for PEFT's.
        peer_limit: seconds that a peer whose time can be told in advance may take, by the
            operations of its full decompositions; beyond, it is not run and the row says so.
        exact_limit: seconds of torch.linalg's computation beyond which it is timed on some layers
            of each shape and scaled; the row says so.
        reserve: seconds kept for each strategy still to come, when a model's share of `seconds`
            runs out.
        process_limit: seconds for a model's whole process.
        exclude: by method, a regular expression of modules to leave out on both sides, because
            PEFT fails on them.
    """

    models: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    repetitions: int = 7
    budget: float = 1.0
    time_limit: float = 120.0
    limits: dict[str, float] = field(default_factory=dict)
    peer_limit: float = 120.0
    exact_limit: float = 2.0
    reserve: float = 5.0
    process_limit: float = 1800.0
    exclude: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for method in (*self.methods, *self.exclude, *self.limits):
            one_of("initialization.methods and the keys of exclude and limits", method, METHODS)
        at_least("initialization.repetitions", self.repetitions, 1)
        at_least("initialization.budget", self.budget, 0)
        for name in ("time_limit", "peer_limit", "process_limit"):
            at_least(f"initialization.{name}", getattr(self, name), 0.01)
        for name in ("exact_limit", "reserve"):
            at_least(f"initialization.{name}", getattr(self, name), 0)
        for method, seconds in self.limits.items():
            at_least(f"initialization.limits.{method}", seconds, 0.01)


@dataclass
class CalibrationSettings:
    """Plain and observed forward passes over the same batches.

    Attributes:
        batches: of a model's calibration shape, at least 2,048 tokens each: what a user's pass
            has, over which its beginning and end are spread.
        least: batches that are measured, however long they take.
        budget: seconds of a case, after which no further batch is begun.
    """

    models: list[str] = field(default_factory=list)
    batches: int = 8
    least: int = 2
    budget: float = 15.0

    def __post_init__(self) -> None:
        at_least("calibration.batches", self.batches, 1)
        at_least("calibration.least", self.least, 1)
        at_least("calibration.budget", self.budget, 0)


@dataclass
class BenchmarkConfig:
    """The whole benchmark.

    Attributes:
        seconds: that all of it may take (see `clock.py`); None: as long as it takes.
        threads: the same for all; None leaves the choice to torch.
    """

    sections: list[str] = field(default_factory=lambda: list(SECTION_NAMES))
    models: dict[str, ModelSettings] = field(default_factory=dict)
    steps: StepsSettings = field(default_factory=StepsSettings)
    injection: InjectionSettings = field(default_factory=InjectionSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    initialization: InitializationSettings = field(default_factory=InitializationSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    rank: int = 8
    alpha: float = 16.0
    device: str = "cpu"
    seconds: float | None = None
    threads: int | None = None
    seed: int = 0
    outputs: str = "outputs"

    def __post_init__(self) -> None:
        for section in self.sections:
            one_of("sections", section, SECTION_NAMES)
            for name in getattr(self, section).models:
                one_of(f"{section}.models", name, tuple(self.models))
                if not self.models[name].present:
                    raise ValueError(
                        f"models.{name}.source is not set, but {section}.models has {name!r}; give "
                        "a folder or a hub name that transformers loads"
                    )
                if self.models[name].source is None and section != "initialization":
                    raise ValueError(
                        f"{section}.models has {name!r}, which is synthetic; allowed are models "
                        "with a tokenizer, that is with a source"
                    )
        at_least("rank", self.rank, 1)
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha!r}; allowed is above 0")
        if self.threads is not None:
            at_least("threads", self.threads, 1)
        if self.seconds is not None:
            at_least("seconds", self.seconds, 1)
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
    return as_settings(composed, BenchmarkConfig)


def to_plain(settings: BenchmarkConfig) -> dict[str, Any]:
    return asdict(settings)


def from_plain(values: dict[str, Any]) -> BenchmarkConfig:
    """The inverse of `to_plain`, for a process that was handed its settings as JSON."""
    return resolve(OmegaConf.merge(OmegaConf.structured(BenchmarkConfig), values))
