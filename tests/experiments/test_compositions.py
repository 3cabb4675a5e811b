"""Every configuration file composes, and what is misspelt is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from methods import METHODS, behavior, one_of_each
from omegaconf import OmegaConf

from experiments.config import store
from experiments.config.run_config import InitConfig, RunConfig
from experiments.errors import ConfigurationError
from experiments.sweep.plan import skip_unsupplied
from lora_init import list_initializers
from lora_init.registry import get_initializer
from lora_init.registry import resolve as resolve_initializer

CONF = Path(__file__).resolve().parents[2] / "conf"
GROUPS = ("model", "data", "training", "tracking", "experiment", "control")
NEEDED = {
    ("model", "local"): ["model.path=somewhere"],
    ("data", "table"): ["data.path=a.csv", "data.text_column=t", "data.label_column=l"],
}


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in GROUPS for name in choices(group)]
)
def test_every_choice_composes(configured, group, name):
    run = configured(f"{group}={name}", *NEEDED.get((group, name), []))
    assert isinstance(run, RunConfig)
    if group in ("model", "data"):
        assert getattr(run, group).name == name


# base is the common part of the others; the benchmark is another application.
PRIMARIES = sorted({path.stem for path in CONF.glob("*.yaml")} - {"base", "benchmark"})
SWEEPS = [name for name in PRIMARIES if name.startswith("sweep_")]


@pytest.mark.parametrize("config", [name for name in PRIMARIES if name not in SWEEPS])
def test_every_primary_composes(composed, config):
    composed(config=config)


@pytest.mark.parametrize("name", choices("init/preset"))
def test_a_preset_differs_from_its_methods_defaults(configured, name):
    preset = configured(f"init=preset/{name}").init
    assert preset != configured(f"init={preset.name}").init
    assert name.startswith(preset.name)


def test_a_glob_finds_every_method_once_and_no_preset():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        options = GlobalHydra.instance().config_loader().get_group_options("init")
    assert options == sorted(method.name for method in list_initializers())


def test_a_method_without_its_input_is_not_in_the_glob(monkeypatch, capsys):
    """A second checkpoint, say, which no run supplies."""
    method = dataclasses.replace(get_initializer("pissa"), reads=frozenset({"second_checkpoint"}))
    others = [method, get_initializer("kaiming")]
    monkeypatch.setattr(store, "list_initializers", lambda: others)
    options = dict(ConfigStore.instance().repo["init"])
    monkeypatch.setitem(ConfigStore.instance().repo, "init", options)
    overrides = {"hydra": {"overrides": {"task": ["init=glob(*)"]}, "sweeper": {}}}
    skip_unsupplied(OmegaConf.create(overrides))
    assert "pissa.yaml" not in options
    assert "kaiming.yaml" in options
    assert "init=pissa is skipped: it needs second_checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("method", one_of_each(METHODS, behavior))
def test_defaults_are_the_librarys(configured, method):
    from dataclasses import asdict

    init = configured(f"init={method}").init
    assert isinstance(init, InitConfig)
    assert init.name == method
    spec, options = resolve_initializer(asdict(init))
    assert spec.name == method
    assert options == spec.options()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("init.nitr=4", "nitr"),
        ("model.nmae=x", "nmae"),
        ("data.test_limt=3", "test_limt"),
        ("training.learning_rat=1", "learning_rat"),
        ("tracking.projct=x", "projct"),
        ("lora.rank=4", "rank"),
        ("seeds.dat=1", "dat"),
        ("paths.output=x", "output"),
        ("sed=1", "sed"),
    ],
)
def test_a_misspelt_key_is_refused_by_name(composed, override, named):
    with pytest.raises(HydraException) as error:
        composed("init=pissa", override)
    assert named in f"{error.value} {error.value.__cause__}"


def test_a_wrong_type_is_refused(composed):
    with pytest.raises(HydraException, match=r"training\.steps=many"):
        composed("training.steps=many")


def test_an_unknown_method_is_refused_with_the_known_ones(composed):
    with pytest.raises(HydraException, match=r"init/pisa(.|\n)*pissa"):
        composed("init=pisa")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=0", "training.steps=0"),
        ("training.schedule=step", "linear, cosine, constant"),
        ("training.learning_rate=-1", "must be a finite number > 0"),
        ("training.warmup=1.5", "training.warmup=1.5"),
        ("training.lora_plus_ratio=0", "training.lora_plus_ratio=0.*A and B"),
        ("training.mixed_precision=int4", "bf16"),
        ("tracking.backend=mlflow", "must be one of none, wandb"),
        ("runtime.device=tpu", "must be one of auto, cpu"),
        ("runtime.micro_batch_size=0", "runtime.micro_batch_size=0.*null"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(configured, override, message):
    with pytest.raises(ConfigurationError, match=message):
        configured(override)


def test_a_mandatory_setting_is_asked_for(configured):
    with pytest.raises(ConfigurationError, match=r"model\.path is not set"):
        configured("model=local")


def test_seeds_follow_seed_unless_set(configured):
    seeds = configured("seed=7", "seeds.data=3").seeds
    assert (seeds.init, seeds.data, seeds.calibration, seeds.head) == (7, 3, 7, 7)


def test_an_experiment_overrides_the_primary(configured):
    run = configured("experiment=arithmetic")
    assert run.data.name == "chain_sum"
    assert run.training.steps == 60
    assert configured("experiment=arithmetic", "training.steps=5").training.steps == 5


def test_the_comparison_keeps_its_promises(configured):
    run = configured(config="sweep_compare")
    assert run.training.steps >= 80
    assert run.data.test_limit >= 1000
    assert (run.model.name, run.data.name, run.sweep) == ("minilm", "rotten_tomatoes", "compare")
    hydra = yaml.safe_load((CONF / "sweep_compare.yaml").read_text())["hydra"]
    assert hydra["mode"] == "MULTIRUN"
    assert len(hydra["sweeper"]["params"]["init"].split(",")) == 8
    assert len(hydra["sweeper"]["params"]["seed"].split(",")) == 2


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_composes_with_a_control(configured, name):
    needed = NEEDED["data", "table"] if name == "sweep_table" else []
    run = configured("control=rslora", *needed, config=name)
    assert run.sweep != "default"
    assert run.control == "rslora"


def test_the_protocol_is_composed_with_its_schema(composed):
    with pytest.raises(HydraException, match="sedes"):
        composed("hydra.sweeper.sedes=[1]", config="sweep_protocol")
