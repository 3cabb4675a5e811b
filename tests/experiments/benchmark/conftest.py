"""The benchmark in small, on tiny models. No time is asserted: a test machine has neighbours."""

import gc
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from known_rates import RATES

from experiments.benchmark import calibration, initialization, isolated, memory, rates
from experiments.benchmark.contest import Arena
from experiments.benchmark.settings import (
    BenchmarkConfig,
    CalibrationSettings,
    InitializationSettings,
    InjectionSettings,
    LayerShape,
    LlamaShape,
    MemorySettings,
    ModelSettings,
    StepsSettings,
    register_schema,
)
from experiments.benchmark.subjects import load_subject

register_schema()
TINY = LlamaShape(2, hidden=16, intermediate=24, heads=4, key_value_heads=2, vocabulary=11)


@pytest.fixture(autouse=True)
def frozen(monkeypatch):
    """A measurement ends by unfreezing everything, and each later collection goes through it."""
    monkeypatch.setattr(gc, "unfreeze", lambda: None)


@pytest.fixture
def composed():
    """`composed("sections=[steps]")` is what Hydra makes of these overrides."""
    root = Path(__file__).resolve().parents[3] / "conf" / "benchmark"

    def build(*overrides):
        with initialize_config_dir(str(root), version_base="1.3"):
            return compose("benchmark", overrides=list(overrides))

    return build


@pytest.fixture
def settings(tiny_encoder, tiny_decoder, tmp_path):
    """All sections on tiny models."""
    targets = {"lora": 0.97, "all_linear": 2.2}
    shape = {"batch_size": 2, "tokens": 8, "rows": 4, "row_tokens": 16, "batches": 2, "ranks": [2]}
    return BenchmarkConfig(
        models={
            "encoder": ModelSettings(
                str(tiny_encoder),
                task="SEQ_CLS",
                targets=targets,
                **shape,
            ),
            "decoder": ModelSettings(str(tiny_decoder), **shape),
            "llama": ModelSettings(llama=TINY, **shape),
            "layer": ModelSettings(layer=LayerShape(24, 16), **shape),
        },
        steps=StepsSettings(["encoder", "decoder"], rounds=3, warmup=1, learning_rate=1e-2),
        injection=InjectionSettings(["encoder", "decoder"], repetitions=2),
        memory=MemorySettings(["encoder"], ["pissa"]),
        initialization=InitializationSettings(["llama"], ["pissa"], repetitions=2),
        calibration=CalibrationSettings(["encoder"], batches=2, budget=0),
        rank=2,
        alpha=4,
        threads=1,
        outputs=str(tmp_path),
    )


@pytest.fixture
def in_process(monkeypatch):
    """What runs in a process of its own runs in this one, its reports through JSON all the same."""

    def run(function, settings, time_limit, variables=None, hear=lambda _: None, **arguments):
        told = []

        def report(measured):
            told.append(json.loads(json.dumps(measured)))
            hear(told[-1])

        function(settings, report, **json.loads(json.dumps(arguments)))
        return isolated.Outcome(told)

    for section in (initialization, calibration, memory):
        monkeypatch.setattr(section, "run_isolated", run)
    for name, value in (("STREAM_BYTES", 2**20), ("DECOMPOSED", 16)):
        monkeypatch.setattr(rates, name, value)
    monkeypatch.setitem(rates.PRODUCT_SIZE, "cpu", 32)


@pytest.fixture
def arena(settings):
    """`arena("layer")` is where strategies compete on one of the models, in this process."""
    return lambda name: Arena(load_subject(name, settings), settings, RATES)
