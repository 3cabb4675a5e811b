"""Controls: what each sets, and that a name never stands for other settings."""

from __future__ import annotations

import pytest

from experiments.config.resolve import resolve
from experiments.config.run_config import control_of
from experiments.errors import ConfigurationError


def test_what_each_control_sets(configured):
    runs = {
        name: configured(f"control={name}")
        for name in ("none", "rslora", "lora_plus", "random_bases", "matched_norm", "psd")
    }
    assert runs["none"] == configured()
    assert runs["rslora"].lora.use_rslora
    assert runs["lora_plus"].training.lora_plus_ratio == 16
    for name in ("random_bases", "matched_norm", "psd"):
        assert runs[name].init.name == name
    assert {name: control_of(run) for name, run in runs.items()} == {name: name for name in runs}


def test_controls_combine_with_other_settings(configured):
    run = configured("experiment=arithmetic", "control=lora_plus", "training.lora_plus_ratio=4")
    assert (run.training.lora_plus_ratio, run.training.steps) == (4, 60)
    assert configured("control=matched_norm", "init.reference=olora").init.reference == "olora"
    assert configured("control=rslora", config="sweep_compare").lora.use_rslora
    # A control that is a method is one also without the group.
    assert control_of(configured("init=random_bases")) == "random_bases"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["control=random_bases", "init=pissa"], "means init=random_bases, and init=pissa"),
        (["control=rslora", "lora.use_rslora=false"], "means lora.use_rslora=true"),
        (["control=lora_plus", "training.lora_plus_ratio=1"], "training.lora_plus_ratio=16"),
    ],
)
def test_a_control_that_was_overridden_is_refused(configured, overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        configured(*overrides)


def test_an_unknown_control_is_refused_with_the_known_ones(composed):

    run = composed()
    run.control = "rslore"
    with pytest.raises(ConfigurationError, match=r"matched_norm.*did you mean 'rslora'"):
        resolve(run)
