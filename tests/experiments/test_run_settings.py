"""Every setting of a run is checked: its type, range and finiteness, and that it exists."""

from __future__ import annotations

import dataclasses

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict

from experiments.config.resolve import resolve
from experiments.config.run_config import RunConfig
from experiments.errors import ConfigurationError

NAN, INFINITE = float("nan"), float("inf")
COUNTS = [
    "training.steps", "training.batch_size", "training.max_length", "training.eval_batch_size",
    "training.max_new_tokens", "calibration.samples", "calibration.batch_size",
    "measures.intruder_directions", "lora.r", "data.train_limit", "data.test_limit",
    "runtime.threads", "runtime.checkpoint_every", "runtime.micro_batch_size", "budget.tokens",
    "budget.trainable_parameters",
]  # fmt: skip
COUNTS_FROM_0 = [
    "training.validate_every", "training.generate_limit", "data.validation_limit",
    "measures.update_every", "measures.forgetting_texts", "measures.intruder_layers",
    "measures.spectra_layers",
]  # fmt: skip
ABOVE_0 = [
    "training.learning_rate", "training.lora_plus_ratio", "training.head_learning_rate",
    "training.max_grad_norm", "lora.lora_alpha", "runtime.checkpoint_minutes",
    "runtime.time_limit_minutes", "runtime.calibration_gib",
]  # fmt: skip
SHARES = ["training.warmup", "lora.lora_dropout", "model.dropout", "data.validation_share"]
SEEDS = ["seed", "seeds.init", "seeds.data", "seeds.calibration", "seeds.head"]
SWITCHES = ["training.save_adapter", "runtime.cache", "lora.use_dora", "read_test"]
WRONG = [
    *((name, value) for name in COUNTS for value in (0, -1, 2**64, 1.5, "many", True)),
    *((name, value) for name in COUNTS_FROM_0 for value in (-1, 2.0, "many", NAN)),
    *((name, value) for name in ABOVE_0 for value in (0, -1.0, NAN, INFINITE, -INFINITE, 10**400)),
    *((name, value) for name in SHARES for value in (-0.1, 1.0, 2, NAN, INFINITE, "half")),
    *((name, value) for name in SEEDS for value in (2**64, 2**63, -(2**63) - 1, 1.5, None, True)),
    *((name, value) for name in SWITCHES for value in ("maybe", 2, None)),
    *(("training.learning_rate", value) for value in (1e36, 1e39)),
    ("training.lora_plus_ratio", 1e40),
    *(("training.weight_decay", value) for value in (-1, NAN, INFINITE)),
    *(("data.test_share", value) for value in (0, 1.0, -1, NAN, 0.95)),
    *(("runtime.threads", value) for value in (1025, 100_000)),
    *(("lora.target_modules", value) for value in (5, [5], [""], {"a": 1}, True)),
    *(("lora.modules_to_save", value) for value in (5, [5])),
    *(("training.schedule", value) for value in ("step", None, 1)),
    *(("tracking.project", value) for value in ("", "a/b", "x" * 129, None, 3)),
    *(("calibration.path", value) for value in ("", "a\0b", 5)),
    *(("data.name", value) for value in ("", " ", "a\nb", None)),
]  # fmt: skip


def changed(run: RunConfig, setting: str, value) -> RunConfig:
    """The run with one setting replaced, as Python code would do it."""
    *groups, name = setting.split(".")
    if not groups:
        return dataclasses.replace(run, **{name: value})
    group = dataclasses.replace(getattr(run, groups[0]), **{name: value})
    return dataclasses.replace(run, **{groups[0]: group})


@pytest.fixture(scope="module")
def plain(whole_composition) -> RunConfig:
    return resolve(whole_composition("train", ()))


@pytest.mark.parametrize(("setting", "value"), WRONG)
def test_a_value_that_cannot_work_is_refused_by_name(plain, setting, value):
    with pytest.raises(ConfigurationError) as error:
        changed(plain, setting, value)
    told = str(error.value)
    named = "data.validation_share" if (setting, value) == ("data.test_share", 0.95) else setting
    assert told.startswith(f"{named}=")
    assert " is not supported: must be " in told
    assert len(told) < 600


@pytest.mark.parametrize(
    ("setting", "value"),
    [("training.max_grad_norm", None), ("training.head_learning_rate", None),
     ("training.warmup", 0), ("seed", -1), ("seed", 2**63 - 1), ("seed", -(2**63)),
     ("runtime.threads", None), ("runtime.threads", 1024), ("lora.target_modules", "q"),
     ("lora.target_modules", ["q", "v"]), ("lora.target_modules", None), ("model.dropout", None),
     ("data.validation_limit", 0), ("data.train_limit", None), ("data.validation_share", 0),
     ("measures.intruder_layers", None), ("training.learning_rate", 1)],
)  # fmt: skip
def test_values_at_the_edge_are_taken(plain, setting, value):
    changed(plain, setting, value)


@pytest.mark.parametrize(
    "override",
    ["training.max_grad_norm=-1", "training.head_learning_rate=nan", "calibration.batch_size=0",
     "data.validation_share=2", "lora.target_modules=5", "runtime.threads=100000",
     "seed=36893488147419103232", "seed=-36893488147419103232"],
)  # fmt: skip
def test_the_command_line_says_so(configured, override):
    with pytest.raises(ConfigurationError, match=" is not supported: must be ") as error:
        configured(override)
    assert str(error.value).startswith(override.partition("=")[0])


@pytest.mark.parametrize(
    ("override", "known"),
    [("+training.stepz=5", "steps"), ("++training.Steps=5", "steps"), ("+newgroup.x=1", "init"),
     ("+seeds.dta=1", "data"), ("+init.nitr=4", "niter"), ("+lora.rank=4", "r"),
     ("+runtime.thread=4", "threads"), ("+data.path=x", "name"), ("+model.path=x", "name"),
     ("++measures.a.b=1", "update_every"), ("+sede=1", "seed"), ("+tracking.entity=x", "project"),
     ("+control_=none", "control"), ("+training.stepz=???", "steps"),
     ("+training.stepz=${seed}", "steps")],
)  # fmt: skip
def test_a_setting_that_does_not_exist_is_refused_by_name(configured, override, known):
    """Hydra's "+" adds it, and nothing would read it."""
    with pytest.raises(ConfigurationError, match=r"is not a setting: .*must be one of") as error:
        configured("init=pissa", override)
    name = override.lstrip("+").partition("=")[0].split(".")
    assert str(error.value).startswith((".".join(name) + " ", name[0] + " ", ".".join(name[:2])))
    assert known in str(error.value)


def test_mappings_may_hold_any_key(configured):
    run = configured("+lora.rank_pattern={query: 4}")
    assert run.lora.rank_pattern == {"query": 4}


@pytest.mark.parametrize("value", ["0", "-2", "nan", "[]"])
def test_an_epochs_steps_are_checked(composed, value):
    made = composed()
    with open_dict(made):
        made.training.steps = f"${{steps_of:{value},8,4}}"
    with pytest.raises((ConfigurationError, HydraException), match=r"steps_of|steps"):
        resolve(made)
    made.training.steps = "${steps_of:1,8,4}"
    assert OmegaConf.to_object(made).training.steps == 2


def test_a_users_configurations_extend_ours(command, tmp_path):
    """A preset, and a primary configuration, in a folder of the user's."""
    presets = tmp_path / "init" / "preset"
    presets.mkdir(parents=True)
    preset = "defaults:\n  - /init/pissa@_here_\n  - _self_\nniter: 3\n"
    (presets / "mine.yaml").write_text(preset)
    (tmp_path / "my_run.yaml").write_text("defaults:\n  - train\n  - _self_\nsweep: mine\n")
    ours = ["--config-dir", str(tmp_path), "--config-name", "my_run", "--cfg", "job"]
    status, shown, _ = command(*ours, "init=preset/mine")
    assert status == 0
    assert "name: pissa\n  niter: 3" in shown
    assert "sweep: mine" in shown
