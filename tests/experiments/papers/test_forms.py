"""Every reproduction: its three forms compose, and the smoke form writes its files."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from string import printable

import pytest
from products import chosen
from substitutes import random_llama

from experiments.errors import ConfigurationError
from experiments.papers.catalogue import FAMILY, NAMES, load_reproduction
from experiments.papers.claim import Verdict
from experiments.papers.reproduction import FORMS
from experiments.papers.result import read_result, write_result


@pytest.mark.parametrize("form", chosen(FORMS, "fast"))
@pytest.mark.parametrize("name", [*NAMES, *FAMILY])
def test_every_form_composes(composed_paper, name, form):
    settings = composed_paper(name, form)
    assert type(settings) is load_reproduction(name).options
    assert settings.form == form


# SmolLM2 takes most of the time, so a random model of two blocks replaces it. Rank scaling keeps
# the real one, and `make test-papers` uses it everywhere.
SUBSTITUTED = {
    "fast_svd": ("model", {"adapted_every": 1}),
    "loftq_iterations": ("language_model", {"language_every": 1, "measured_every": 1}),
    "corda_compression": ("model", {"blocks_apart": 1}),
    "corda_knowledge": ("model", {"blocks_apart": 1}),
}


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Path:
    """A random Llama of two blocks whose tokens are characters."""
    return random_llama(tmp_path_factory.mktemp("text-model"), width=64, characters=printable)


@pytest.mark.parametrize("name", chosen((*NAMES, *FAMILY), "first_step"))
def test_the_smoke_form_writes_its_files(smoke, composed_paper, text_model, tmp_path, name):
    replaced = {}
    if name in SUBSTITUTED:
        setting, others = SUBSTITUTED[name]
        replaced = {setting: str(text_model), **others}
    findings, paper = smoke(name, **replaced), load_reproduction(name)
    assert findings.claims
    assert findings.figures
    assert findings.tables
    for claim in findings.claims:
        assert isinstance(claim.verdict, Verdict)
        for field in fields(claim):
            assert "nan" not in str(getattr(claim, field.name)).lower().split()
        assert claim.ours
        assert claim.criterion
    for table in findings.tables:
        assert len(table.frame)
        empty = table.frame.isna().all()
        assert not empty.any(), f"{table.name}: empty columns {list(table.frame.columns[empty])}"
    settings = composed_paper(name, "smoke", f"output={tmp_path}", **replaced)
    written = write_result(paper, settings, findings, seconds=1.0)
    folder = tmp_path / "smoke" / name
    again = read_result(folder)
    assert again.claims == findings.claims
    assert again.fingerprint == written.fingerprint
    for figure in findings.figures:
        assert (folder / f"{figure.name}.png").stat().st_size > 5_000
        assert "NaN" not in (folder / f"{figure.name}.svg").read_text()
    for table in findings.tables:
        assert (folder / f"{table.name}.csv").read_text().count("\n") == len(table.frame) + 1
    json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", [*NAMES, *FAMILY])
def test_a_misspelt_setting_is_refused_by_name(composed_paper, name):
    from hydra.errors import HydraException

    with pytest.raises(HydraException, match="sede"):
        composed_paper(name, "fast", "sede=1")


@pytest.mark.parametrize("name", [*NAMES, *FAMILY])
def test_a_bad_value_is_refused(composed_paper, name):
    with pytest.raises(
        ConfigurationError, match="device='tpu' is not supported: must be one of auto, cpu, cuda"
    ):
        composed_paper(name, "fast", "device=tpu")
