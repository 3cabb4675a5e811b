"""The benchmark's configuration: what composes, what is refused."""

import json

import pytest

from experiments.benchmark import synthetic
from experiments.benchmark.settings import LayerShape, ModelSettings, from_plain, resolve, to_plain
from experiments.benchmark.strategies import METHODS
from experiments.errors import ConfigurationError


def test_the_yaml_composes_and_travels(composed):
    settings = resolve(composed())
    assert sorted(settings.sections) == ["calibration", "initialization", "injection", "memory"]
    assert settings.models["smollm2"].targets["olora"] == 12
    assert settings.seconds == 800
    assert settings.initialization.methods == list(METHODS)
    assert from_plain(json.loads(json.dumps(to_plain(settings)))) == settings


@pytest.mark.parametrize("model", ["minilm", "smollm2", "llama_47m", "llama2_7b_shapes"])
def test_one_model_alone(composed, model):
    settings = resolve(composed(f"model={model}"))
    assert settings.initialization.models == [model]
    assert settings.injection.models in ([model], ["minilm", "smollm2"])


def test_the_47m_model_has_as_many(composed):
    shape = resolve(composed()).models["llama_47m"].llama
    assert synthetic.parameters(shape) == pytest.approx(47e6, rel=0.01)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sections=[stepz]", "sections: 'stepz'; did you mean 'steps'? allowed are initialization"),
        (
            "injection.models=[bert]",
            "injection.models: 'bert'; allowed are minilm, smollm2, llama_47m",
        ),
        ("steps.rounds=1", "steps.rounds=1; allowed is 2 or more"),
        ("memory.methods=[pisa]", "did you mean 'pissa'?"),
        ("device=mps", "device: 'mps'; allowed are cpu, cuda"),
        ("threads=0", "threads=0; allowed is 1 or more"),
        ("seconds=0", "seconds=0.0; allowed is 1 or more"),
        ("models.minilm.share=0", "models.*.share=0.0; allowed is above 0"),
        ("injection.models=[local]", "models.local.source is not set, but injection.models has"),
        (
            "injection.models=[llama_47m]",
            "injection.models has 'llama_47m', which is synthetic; allowed",
        ),
        ("+initialization.limits.evo=3", "'evo'; did you mean 'eva'?"),
        ("+models.minilm.targets.pisa=3", "a key of models.*.targets: 'pisa'"),
    ],
)
def test_bad_settings(composed, override, told):
    with pytest.raises(ConfigurationError) as error:
        resolve(composed(override))
    assert told in str(error.value)


def test_a_model_is_of_one_kind():
    with pytest.raises(ValueError, match="source and layer are set; a model is one of them"):
        ModelSettings("minilm", layer=LayerShape())
