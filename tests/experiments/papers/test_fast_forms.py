"""The fast form of every reproduction, as `make papers` runs it, compared with its page.

Each takes two to eight minutes, so `make test` excludes them and `make test-papers` runs them.
test_forms.py runs the smoke forms.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.papers.catalogue import FAMILY, NAMES
from experiments.papers.page import read_verdicts
from experiments.papers.result import read_result

ROOT = Path(__file__).resolve().parents[3]
PAGES = {name: read_verdicts(ROOT / "docs" / name) for name in ("papers", "family")}


@pytest.mark.fast_form
@pytest.mark.parametrize("name", [*NAMES, *PAGES["family"]])
def test_the_fast_form_gives_the_verdicts_of_the_page(tmp_path, name):
    command = [
        sys.executable, "-m", f"experiments.papers.{name}", "--config-name", "fast",
        f"output={tmp_path}", "threads=1",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    result = read_result(tmp_path / "fast" / name)
    found = {claim.statement: claim for claim in result.claims}
    kept = {claim.statement: claim for claim in {**PAGES["papers"], **PAGES["family"]}[name]}
    assert list(found) == list(kept)
    for statement, claim in kept.items():
        measured = found[statement]
        assert measured.criterion == claim.criterion
        assert measured.published == claim.published
        if not claim.timed:
            assert measured.verdict == claim.verdict, (
                f"{statement}: {measured.verdict} ({measured.ours}), on the page {claim.verdict} "
                f"({claim.ours})"
            )
    for figure in result.figures:
        assert (tmp_path / "fast" / name / f"{figure['name']}.png").stat().st_size > 5_000


def test_the_pages_have_their_reproductions():
    assert tuple(PAGES["papers"]) == NAMES
    assert "start_family" in PAGES["family"]
    assert set(PAGES["family"]) <= set(FAMILY)
