"""The benchmark on tiny models. No test asserts a time, because other work shares the machine."""

import gc
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.benchmark.schema import (
    SECTIONS,
    BenchmarkConfig,
    ExpertsSettings,
    LlamaShape,
    ModelSettings,
    SectionSettings,
    register_schema,
)

register_schema()
TINY = LlamaShape(2, hidden=16, intermediate=24, heads=4, key_value_heads=2, vocabulary=11)


@pytest.fixture(autouse=True)
def quick_collections(monkeypatch):
    """Skip the garbage collections between turns, which are slow in a process with many objects."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


@pytest.fixture(scope="session")
def composed():
    """`composed("sections=[steps]")` is what Hydra composes from these overrides."""
    root = Path(__file__).resolve().parents[3] / "conf" / "benchmark"

    def build(*overrides):
        with initialize_config_dir(str(root), version_base="1.3"):
            return compose("benchmark", overrides=list(overrides))

    return build


@pytest.fixture(scope="session")
def default(composed):
    """The configuration without overrides, which accepts unknown keys."""
    made = composed()
    OmegaConf.set_struct(made, False)
    return made


@pytest.fixture
def settings(tiny_encoder, tiny_decoder, tmp_path):
    """The sections of one process, on tiny models."""
    shape = {"batch_size": 2, "tokens": 8, "rows": 4, "row_tokens": 16, "batches": 2, "ranks": [2]}
    return BenchmarkConfig(
        models={
            "encoder": ModelSettings(
                str(tiny_encoder), task="SEQ_CLS", exclude=".*pooler.*", sample=1, **shape
            ),
            "decoder": ModelSettings(str(tiny_decoder), **shape),
            "llama": ModelSettings(llama=TINY, sample=1, **shape),
        },
        initialization=SectionSettings(["llama"], ["pissa", "kaiming"], rounds=2),
        calibration=SectionSettings(["encoder"], rounds=2),
        memory=SectionSettings(["encoder"], ["pissa"]),
        steps=SectionSettings(["encoder"], rounds=2),
        experts=ExpertsSettings(
            rounds=2,
            layers=1,
            hidden=32,
            heads=2,
            experts=4,
            width=16,
            top_k=2,
            vocabulary=16,
            batch_size=2,
            tokens=8,
        ),
        sections=[section for section in SECTIONS if section != "sharded"],
        rank=2,
        alpha=4,
        threads=1,
        outputs=str(tmp_path),
    )
