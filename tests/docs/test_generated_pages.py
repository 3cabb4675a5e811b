"""Tables and pages that follow from the registry, and the site as a whole."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_init
from lora_init import list_initializers
from lora_init.cli.support import support_table

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


@pytest.fixture(scope="module")
def pages():
    """The module docs/registry_pages.py."""
    spec = importlib.util.spec_from_file_location(
        "registry_pages", ROOT / "docs" / "registry_pages.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_table_of_the_registry(pages):
    """If it fails, run `make readme`."""
    assert pages.with_table(README.read_text()) == README.read_text()


def test_the_table_has_what_each_method_declares(pages):
    rows = pages.methods_table().splitlines()[2:]
    for spec, row in zip(list_initializers(), rows, strict=True):
        name, what, reads, base, _ = row.strip("| ").split(" | ")
        assert name == f"`{spec.name}`"
        assert len(what) > 10
        assert set(reads.replace("–", "").split(", ")) - {""} == spec.reads
        assert base == spec.base


def test_the_table_of_the_readme_has_every_method_once(pages):
    names = [row.split(" | ")[0] for row in pages.short_table().splitlines()[2:]]
    listed = [name.strip("| `") for cell in names for name in cell.split(", ")]
    assert sorted(listed) == [spec.name for spec in list_initializers()]


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_a_page_is_written_for_each_method(pages, tmp_path):
    folder = tmp_path / "methods"
    pages.write_pages(folder)
    names = {spec.name for spec in list_initializers()}
    assert {path.stem for path in folder.glob("*.md")} == {*names, "index"}
    index = (folder / "index.md").read_text()
    assert support_table() in index
    assert all(f"({name}.md)" in index for name in names)
    (folder / "gone.md").touch()
    pages.write_pages(folder)
    assert not (folder / "gone.md").exists()


@pytest.mark.parametrize("spec", list_initializers(), ids=lambda spec: spec.name)
def test_a_page_explains_its_options(pages, spec):
    page = pages.method_page(spec)
    for option in vars(spec.options()):
        assert f"| `{option}` |" in page
        assert f"| `{option}` |  |" not in page
        row = next(line for line in page.splitlines() if line.startswith(f"| `{option}` |"))
        assert row.rpartition("` | ")[2].strip("| "), f"{option} has no description"


@pytest.mark.parametrize("spec", list_initializers(), ids=lambda spec: spec.name)
def test_the_code_of_a_page_runs(pages, spec):
    def loss(model, batch):
        return model(batch).square().mean()

    batches = lora_init.WithLoss([torch.randn(64, 32)], loss)
    scope = {
        "LoraConfig": lora_init.LoraConfig,
        "get_peft_model": lora_init.get_peft_model,
        "model": torch.nn.Sequential(torch.nn.Linear(32, 32)),
        "second_checkpoint": {"0.weight": torch.randn(32, 32)},
        "batches": batches,
        "learn_batches": batches,
        "keep_batches": [torch.randn(8, 32)],
    }
    code = pages.method_page(spec).partition("```python\n")[2].partition("```")[0]
    exec(code, scope)
    assert scope["model"].peft_config.init_lora_weights == spec.name


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    listed = [line.split(":: ")[1] for line in text.splitlines() if line.startswith(".. auto")]
    assert sorted(listed) == sorted(lora_init.__all__)


@pytest.mark.exhaustive
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "methods" / "pissa.html").is_file()
