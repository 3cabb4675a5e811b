"""Tests of the page, of result folders, and of the command that runs all reproductions."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from experiments.papers import __main__ as command
from experiments.papers import result as results
from experiments.papers.application import carry_out
from experiments.papers.catalogue import NAMES, load_reproduction
from experiments.papers.claim import Verdict
from experiments.papers.page import count_verdicts, read_verdicts, verdict_counts, write_page
from experiments.papers.reproduction import Measurement
from experiments.papers.result import fingerprint, read_result, write_result
from experiments.papers.text import claims_markdown

ROOT = Path(__file__).resolve().parents[3]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
NAME = "rank_scaling"


def measured(options) -> Measurement:
    """Rows of rank scaling without a model."""
    scalings = ("alpha / r", "alpha / √r")
    steps = [
        {"scaling": scaling, "rank": rank, "step": step, "loss": 3.0, "norm": 1 / rank}
        for scaling in scalings
        for rank in (2, 4, 8)
        for step in (1, 2)
    ]
    losses = {(scaling, rank): [3 - rank / 8, 4.0] for scaling in scalings for rank in (2, 4, 8)}
    frames = {"steps": pd.DataFrame(steps), "losses": pd.DataFrame(losses)}
    return Measurement(options, frames, {"model": "made up"})


@pytest.fixture(scope="module")
def reproduction():
    return replace(load_reproduction(NAME), measure=measured)


@pytest.fixture(scope="module")
def result(reproduction, composed_paper, tmp_path_factory):
    options = composed_paper(NAME, "smoke", f"output={tmp_path_factory.mktemp('papers')}")
    return write_result(reproduction, options, reproduction.reproduce(options), seconds=2.0)


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
    hostile = replace(result.claims[0], statement="<script>x</script> | a", remark="A & B.")
    result = replace(result, claims=[hostile, *result.claims[1:]])
    return write_page([result], tmp_path_factory.mktemp("page"))


def test_the_page_has_every_claim_and_loads_nothing(page, result):
    text = page.read_text()
    for claim in result.claims[1:]:
        assert claim.statement in text
        assert f">{claim.verdict}<" in text
    assert "<script>x" not in text.split('id="specifications"')[0]
    assert "http://" not in text.split("<script>")[0]
    assert "https://" not in text.split("<script>")[0]


def test_the_markdown_has_claims_and_pictures(page, result):
    text = (page.parent / "README.md").read_text()
    assert "\\| a" in text
    for figure in result.figures:
        name = f"{NAME}-{figure['name']}.png"
        assert f"]({name})" in text
        assert (page.parent / name).is_file()
    for line in [line for line in text.splitlines() if line.startswith("| Under")]:
        assert line.count(" | ") == 4


def test_the_verdicts_can_be_read_again(page, result):
    kept = read_verdicts(page.parent)
    assert list(kept) == [NAME]
    assert kept[NAME][1:] == result.claims[1:]


def test_our_own_questions_are_counted_separately(result):
    claims = [
        replace(result.claims[0], verdict=Verdict.REPRODUCED),
        replace(result.claims[0], verdict=Verdict.CONTRADICTS, published=False),
        replace(result.claims[0], verdict=Verdict.NOT_REPRODUCED),
    ]
    made = replace(result, claims=claims)
    assert count_verdicts([made]) == (
        "2 published claims: 1 reproduced, 1 not reproduced; 1 question of our own: 1 contradicts"
    )
    headers, rows = verdict_counts([made])
    assert headers == ["what was measured again", "reproduced", "not reproduced", "our own"]
    assert rows == [[result.title, "1", "1", "1"]]
    assert "(our own question)" in claims_markdown(claims).splitlines()[3]


def test_pictures_of_dropped_figures_are_deleted(result, tmp_path):
    for name in (f"{NAME}-earlier.png", "another-one.png"):
        (tmp_path / name).touch()
    write_page([result], tmp_path)
    drawn = {f"{NAME}-{figure['name']}.png" for figure in result.figures}
    assert {path.name for path in tmp_path.glob("*.png")} == drawn | {"another-one.png"}


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium to open the page")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_every_chart_without_a_message(page, result, tmp_path, width):
    # A Chromium window is at least 500 pixels wide, a frame may be narrower.
    frame = tmp_path / "frame.html"
    script = (
        "onload = () => setTimeout(() => { const d = f.contentDocument;"
        " document.title = [d.body.dataset.ready, d.querySelectorAll('.chart svg').length,"
        " d.documentElement.scrollWidth <= d.documentElement.clientWidth].join(' '); }, 6000)"
    )
    frame.write_text(
        f'<iframe id="f" src="{page.as_uri()}" style="width:{width}px;height:900px;border:0">'
        f"</iframe><script>{script}</script>"
    )
    arguments = [
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        *(f"--disable-{part}" for part in ("gpu", "quic", "sync", "background-networking")),
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        "--window-size=1400,1000",
        "--virtual-time-budget=9000",
        "--dump-dom",
    ]
    profile = f"--user-data-dir={tmp_path}/profile"
    line = [BROWSER, profile, *arguments, frame.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert [message for message in done.stderr.splitlines() if "CONSOLE" in message] == []
    assert f"<title>yes {len(result.figures)} true</title>" in done.stdout


def test_every_verdict_has_a_color():
    style = (ROOT / "experiments/papers/page.css").read_text()
    for verdict in set(Verdict) - {Verdict.NOT_JUDGED}:
        assert f".verdict.{str(verdict).replace(' ', '-')} " in style


# -- result folders --------------------------------------------------------------------------------


class Measured(Exception):
    """Raised in place of a measurement."""


@pytest.mark.parametrize("override", [None, "rerun=true", "seed=1", "steps=3"])
def test_only_changed_options_or_rerun_measure_again(
    result, reproduction, composed_paper, capsys, override
):
    def measure(options):
        raise Measured

    changes = [override] if override else []
    options = composed_paper(NAME, "smoke", f"output={result.settings['output']}", *changes)
    again = replace(reproduction, measure=measure)
    if override is None:
        assert carry_out(again, options).claims == result.claims
        assert "finished before" in capsys.readouterr().out
    else:
        with pytest.raises(Measured):
            carry_out(again, options)


def test_the_fingerprint_depends_on_the_code(composed_paper, monkeypatch):
    options = composed_paper(NAME, "smoke")
    before = fingerprint(NAME, options)
    assert fingerprint(NAME, replace(options, threads=1, output="elsewhere")) == before
    monkeypatch.setattr(results, "source_hash", lambda name: "another")
    assert fingerprint(NAME, options) != before


@pytest.mark.parametrize("content", ["", "{", '{"claims": []}', '{"claims": [{"verdict": "?"}]}'])
def test_an_incomplete_result_is_ignored(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    assert read_result(tmp_path) is None


# -- all reproductions -----------------------------------------------------------------------------


def test_each_runs_in_a_process_and_a_failure_is_named(monkeypatch, capsys):
    commands = []

    class Started:
        def __init__(self, line, **settings):
            commands.append(line)
            self.returncode = int("fast_svd" in " ".join(line))
            self.stdout = ["measured\n"]
            assert settings["env"]["OMP_NUM_THREADS"]

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

    monkeypatch.setattr(command.subprocess, "Popen", Started)
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda process: range(6), raising=False)
    options = command.AllPapers(overrides=["device=cpu"], rerun=True, form="full", at_once=2)
    assert command.measure_all(options) == ["fast_svd"]
    assert len(commands) == len(NAMES)
    words = f"-m experiments.papers.{NAMES[0]} --config-name full output=outputs/papers threads=3"
    assert commands[0] == [sys.executable, *words.split(), "device=cpu", "rerun=true"]
    output = capsys.readouterr().out
    assert "rank_scaling: measured" in output
    assert "fast_svd: FAILED" in output


def test_a_failed_reproduction_is_not_on_the_page(result):
    options = command.AllPapers(form="smoke", output=result.settings["output"])
    assert [found.name for found in command.collect_results(options)] == [NAME]
    assert command.collect_results(options, without=[NAME]) == []


def test_the_page_is_written_from_existing_results(result, tmp_path, monkeypatch, capsys):
    words = ["measure=false", "form=smoke", f"output={result.settings['output']}"]
    monkeypatch.setattr(sys, "argv", ["papers", *words, f"page={tmp_path}/page"])
    command.register_schema()  # a process that ran the module has the schema of `__main__`
    command.main()
    assert (tmp_path / "page" / "index.html").is_file()
    assert NAME in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("papers=[fast_sdv]", "did you mean 'fast_svd'"),
        ("at_once=0", "at_once=0 is not supported: must be an integer >= 1, or null"),
        ("form=quick", "form='quick' is not supported: must be one of smoke, fast, full"),
    ],
)
def test_misspelt_options_are_refused(monkeypatch, capsys, override, message):
    monkeypatch.setattr(sys, "argv", ["papers", "measure=false", override])
    command.register_schema()
    with pytest.raises(SystemExit):
        command.main()
    assert message in capsys.readouterr().err
