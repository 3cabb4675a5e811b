"""Every command of docs/launchers.md names launchers and settings that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from experiments.sweep.manifest import run_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "launchers.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines()
    if "experiments.train" in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_composes(line):
    words = shlex.split(line, comments=True)
    words = words[words.index("experiments.train") + 1 :]
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    config = words[words.index("--config-name") + 1] if "--config-name" in words else "train"
    launcher = next((w.partition("=")[2] for w in overrides if w.startswith("hydra/l")), "basic")
    if f"{launcher}.yaml" not in [*ConfigStore.instance().list("hydra/launcher"), "basic.yaml"]:
        pytest.skip(f"the plugin of hydra/launcher={launcher} is not installed")
    # A sweep's lists are the sweeper's: one of their runs is composed here.
    single = [re.sub(r"=(glob\(\*\)|[\w.]+,.*)$", "", word) + one(word) for word in overrides]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose(config, overrides=single, return_hydra_config=True)
    if "hydra/launcher=" in line:
        assert launcher.partition("_")[0] in composed.hydra.launcher._target_.lower()
        settings = {key: value for key, value in composed.hydra.launcher.items() if key != "name"}
        assert settings  # each one resolved
    assert run_of(composed).init.name


def one(word: str) -> str:
    """The first value of a list in an override that sweeps, else its value is left as it is."""
    value = word.partition("=")[2]
    if value == "glob(*)":
        return "=kaiming"
    return "=" + value.split(",")[0] if re.fullmatch(r"[\w.]+,.*", value) else ""


def test_the_page_has_a_command_for_each_launcher():
    for name in ("joblib", "ray", "submitit_slurm", "submitit_local"):
        assert f"hydra/launcher={name}" in PAGE
    assert "accelerate launch" in PAGE
    assert "sweep_optuna" in PAGE
    assert len(COMMANDS) >= 9
