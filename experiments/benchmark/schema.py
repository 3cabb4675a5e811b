"""The settings of the benchmark: the schema of `conf/benchmark/benchmark.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from ..config.bounds import check_choice, check_integer, check_number
from ..config.resolve import as_settings
from .strategies import METHODS

SECTIONS = ("initialization", "calibration", "memory", "steps", "experts", "sharded")
EXPERT_METHODS = ("pissa", "pissa_niter_4", "olora")
TASKS = ("SEQ_CLS", "CAUSAL_LM")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class LlamaShape:
    """The sizes of a Llama model with power-law weights."""

    layers: int = 1
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    key_value_heads: int = 4
    vocabulary: int = 720
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "intermediate", "heads", "key_value_heads", "vocabulary"):
            check_integer(f"models.*.llama.{name}", getattr(self, name), 1)
        check_choice("models.*.llama.dtype", self.dtype, DTYPES)


@dataclass
class ModelSettings:
    """One model and its batches.

    Attributes:
        source: "minilm", "smollm2", or a folder or hub name that transformers loads.
        llama: a synthetic model in place of `source`.
        task: "SEQ_CLS" (sentences padded to `tokens`) or "CAUSAL_LM" (text without padding).
        batch_size, tokens: the shape of a training batch.
        rows, row_tokens, batches: the shape of a calibration batch, and how many there are.
        ranks: the ranks of the section `initialization`.
        exclude: a regular expression of layers that no contender adapts.
        sample: how many layers of each shape are timed where peers decompose whole matrices,
            and judged; None for all.
        methods: the methods that are measured; None for all.
        peers: the methods in which PEFT and torch.linalg take part; None for all.
    """

    source: str | None = None
    llama: LlamaShape | None = None
    task: str = "CAUSAL_LM"
    batch_size: int = 4
    tokens: int = 128
    rows: int = 4
    row_tokens: int = 512
    batches: int = 1
    ranks: list[int] = field(default_factory=lambda: [16])
    exclude: str | None = None
    sample: int | None = 2
    methods: list[str] | None = None
    peers: list[str] | None = None

    def __post_init__(self) -> None:
        check_choice("models.*.task", self.task, TASKS)
        for name in ("batch_size", "rows", "batches"):
            check_integer(f"models.*.{name}", getattr(self, name), 1)
        for name in ("tokens", "row_tokens"):
            check_integer(f"models.*.{name}", getattr(self, name), 2)
        for rank in self.ranks:
            check_integer("models.*.ranks", rank, 1)
        if self.sample is not None:
            check_integer("models.*.sample", self.sample, 1)
        for name in ("methods", "peers"):
            for method in getattr(self, name) or ():
                check_choice(f"models.*.{name}", method, METHODS)
        if self.source is not None and self.llama is not None:
            raise ValueError(
                "models.*.source and models.*.llama are not supported together: must be one of "
                "them. Leave the other out."
            )


@dataclass
class SectionSettings:
    """One section.

    Attributes:
        models: the models that it measures.
        methods: the initializations that it measures, where it has a choice.
        rounds: the most rounds of a comparison.
        budget: the seconds after which a comparison starts no further round.
    """

    models: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    rounds: int = 7
    budget: float = 10.0

    def __post_init__(self) -> None:
        for method in self.methods:
            check_choice("*.methods", method, METHODS)
        check_integer("*.rounds", self.rounds, 1)
        check_number("*.budget", self.budget, least=0)


@dataclass
class ExpertsSettings(SectionSettings):
    """The section on mixtures of experts, and the sizes of its model and batches.

    Attributes:
        width: of an expert; `top_k` experts read a token.
    """

    methods: list[str] = field(default_factory=lambda: list(EXPERT_METHODS))
    layers: int = 4
    hidden: int = 512
    heads: int = 8
    experts: int = 32
    width: int = 256
    top_k: int = 4
    vocabulary: int = 4096
    batch_size: int = 4
    tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in self.methods:
            check_choice("experts.methods", method, EXPERT_METHODS)
        for name in ("layers", "hidden", "heads", "experts", "width", "top_k", "batch_size"):
            check_integer(f"experts.{name}", getattr(self, name), 1)
        for name in ("vocabulary", "tokens"):
            check_integer(f"experts.{name}", getattr(self, name), 2)


@dataclass
class ShardedSettings(SectionSettings):
    """The section on sharded bases.

    Attributes:
        ranks: the numbers of processes.
        layers, width: the linear layers, (width, width) in float32.
    """

    methods: list[str] = field(default_factory=lambda: ["pissa"])
    ranks: list[int] = field(default_factory=lambda: [1, 2, 4])
    layers: int = 8
    width: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in self.ranks:
            check_integer("sharded.ranks", rank, 1)
        for name in ("layers", "width"):
            check_integer(f"sharded.{name}", getattr(self, name), 1)


@dataclass
class BenchmarkConfig:
    """The whole benchmark.

    Attributes:
        seconds: no comparison starts after so many seconds; None for no limit.
        rank, alpha: of the adapters; `initialization` has the ranks of each model.
        threads: of torch; None for its default.
        page: where a finished run writes its page, with a picture in the same folder.
    """

    sections: list[str] = field(default_factory=lambda: list(SECTIONS))
    models: dict[str, ModelSettings] = field(default_factory=dict)
    initialization: SectionSettings = field(default_factory=SectionSettings)
    calibration: SectionSettings = field(default_factory=SectionSettings)
    memory: SectionSettings = field(default_factory=SectionSettings)
    steps: SectionSettings = field(default_factory=SectionSettings)
    experts: ExpertsSettings = field(default_factory=ExpertsSettings)
    sharded: ShardedSettings = field(default_factory=ShardedSettings)
    seconds: float | None = None
    rank: int = 8
    alpha: float = 16.0
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    outputs: str = "outputs"
    page: str | None = None

    def __post_init__(self) -> None:
        for section in self.sections:
            check_choice("sections", section, SECTIONS)
            for name in getattr(self, section).models:
                self._check_model(section, name)
        check_integer("rank", self.rank, 1)
        check_number("alpha", self.alpha, above=0)
        check_integer("threads", self.threads, 1, null="torch's default")
        check_number("seconds", self.seconds, least=1, null="no limit")
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(
                f"device={self.device!r} is not supported: must be a device of torch, e.g. cpu or "
                "cuda."
            ) from error

    def _check_model(self, section: str, name: str) -> None:
        check_choice(f"{section}.models", name, tuple(self.models))
        model = self.models[name]
        if model.source is None and model.llama is None:
            raise ValueError(
                f"models.{name}.source=None is not supported: must be a folder or a hub name that "
                f"transformers loads, because {section}.models has {name!r}."
            )
        if model.source is None and section != "initialization":
            raise ValueError(
                f"{section}.models={name!r} is not supported: must be a model with a source, "
                "because synthetic models have no tokenizer."
            )


def register_schema() -> None:
    ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)


def resolve(composed: DictConfig) -> BenchmarkConfig:
    """Return Hydra's composition as plain dataclasses.

    Raises:
        ConfigurationError: a value that is not supported.
    """
    return as_settings(composed, BenchmarkConfig)
