"""One page of all reproductions: complete, self-contained, drawn in a real browser; and the command
that measures all of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from experiments.papers import __main__ as command
from experiments.papers import application as running
from experiments.papers.catalogue import NAMES, load_paper
from experiments.papers.page import read_verdicts, write_page
from experiments.papers.result import fingerprint, read_result, write_result
from experiments.papers.summary import counted, summary_markdown
from experiments.papers.text import claims_markdown
from experiments.papers.claim import Verdict

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)  # fmt: skip
NAME = "rank_scaling"


@pytest.fixture(scope="module")
def result(smoke, composed_paper, tmp_path_factory):
    folder = tmp_path_factory.mktemp("papers")
    settings = composed_paper(NAME, "smoke", f"output={folder}")
    return write_result(load_paper(NAME), settings, smoke(NAME), seconds=2.0)


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
    hostile = replace(result.claims[0], statement="<script>x</script> | a", remark="A & B.")
    result = replace(result, claims=[hostile, *result.claims[1:]])
    return write_page([result], tmp_path_factory.mktemp("page"))


@pytest.mark.exhaustive
def test_the_page_has_every_claim_with_its_verdict(page, result):
    text = page.read_text()
    for claim in result.claims[1:]:
        assert claim.statement in text
        assert f">{claim.verdict}<" in text
    assert "<script>x" not in text.split('id="specifications"')[0]
    assert "http://" not in text.split("<script>")[0]
    assert "https://" not in text.split("<script>")[0]


@pytest.mark.exhaustive
def test_the_markdown_has_the_same_with_pictures(page, result):
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


def test_questions_of_our_own_are_counted_apart(result):
    claims = [
        replace(result.claims[0], verdict=Verdict.REPRODUCED),
        replace(result.claims[0], verdict=Verdict.CONTRADICTS, published=False),
        replace(result.claims[0], verdict=Verdict.NOT_REPRODUCED),
    ]
    made = replace(result, claims=claims)
    assert counted([made]) == (
        "2 published claims: 1 reproduced, 1 not reproduced; 1 question of our own: 1 contradicts"
    )
    assert summary_markdown([made]).splitlines() == [
        "| what was measured again | reproduced | not reproduced | our own |",
        "| :--- | ---: | ---: | ---: |",
        f"| {result.title} | 1 | 1 | 1 |",
    ]
    assert "(our own question)" in claims_markdown(claims).splitlines()[3]


def test_the_readme_has_the_table_of_the_page():
    root = command.CONFIGURATIONS.parents[1]
    page = (root / "docs" / "papers" / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(page) if line.startswith("| what was measured again"))
    end = page.index("", start)
    assert "\n".join(page[start:end]) in (root / "README.md").read_text()


def test_pictures_that_are_no_longer_drawn_go(result, tmp_path):
    for name in (f"{NAME}-earlier.png", "another-one.png"):
        (tmp_path / name).touch()
    write_page([result], tmp_path)
    kept = {path.name for path in tmp_path.glob("*.png")}
    drawn = {f"{NAME}-{figure['name']}.png" for figure in result.figures}
    assert kept == drawn | {"another-one.png"}


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium to open the page")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_every_chart_and_says_nothing(page, result, tmp_path, width):
    # Chromium's windows are no narrower than 500 pixels: a frame can be.
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
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path}/profile",
        "--enable-logging=stderr", "--window-size=1400,1000", "--virtual-time-budget=9000",
        "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert f"<title>yes {len(result.figures)} true</title>" in done.stdout


# -- the results' folders --------------------------------------------------------------------------


def test_a_finished_one_is_not_measured_again(result, composed_paper, monkeypatch, capsys):
    paper = replace(load_paper(NAME), reproduce=lambda settings: pytest.fail("measured again"))
    output = result.settings["output"]
    again = running.carry_out(paper, composed_paper(NAME, "smoke", f"output={output}"))
    assert again.claims == result.claims
    assert "finished before" in capsys.readouterr().out


@pytest.mark.parametrize("override", ["rerun=true", "seed=1", "steps=3"])
def test_other_settings_or_a_wish_measure_again(result, composed_paper, override):
    class Measured(Exception):
        pass

    def reproduce(settings):
        raise Measured

    paper = replace(load_paper(NAME), reproduce=reproduce)
    output = result.settings["output"]
    with pytest.raises(Measured):
        running.carry_out(paper, composed_paper(NAME, "smoke", f"output={output}", override))


def test_the_fingerprint_follows_the_code(composed_paper, monkeypatch):
    from experiments.papers import result as results

    settings = composed_paper(NAME, "smoke")
    before = fingerprint(NAME, settings)
    assert fingerprint(NAME, replace(settings, threads=1, output="elsewhere")) == before
    monkeypatch.setattr(results, "source_hash", lambda name: "another")
    assert fingerprint(NAME, settings) != before


@pytest.mark.parametrize("content", ["", "{", '{"claims": []}', '{"claims": [{"verdict": "?"}]}'])
def test_half_a_result_is_none(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    assert read_result(tmp_path) is None


# -- all of them -----------------------------------------------------------------------------------


def test_each_has_a_process_and_a_failure_is_named(monkeypatch, capsys):
    commands = []

    class Started:
        def __init__(self, command, **settings):
            commands.append(command)
            self.returncode = int("fast_svd" in " ".join(command))
            self.stdout = ["measured\n"]
            assert settings["env"]["OMP_NUM_THREADS"]

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

    monkeypatch.setattr(command.subprocess, "Popen", Started)
    monkeypatch.setattr(
        command.os, "sched_getaffinity", lambda process: range(6), raising=False
    )
    settings = command.AllPapers(overrides=["device=cpu"], rerun=True, form="full", at_once=2)
    assert command.measure_all(settings) == ["fast_svd"]
    assert len(commands) == len(NAMES)
    assert commands[0] == [
        sys.executable, "-m", f"experiments.papers.{NAMES[0]}", "--config-name", "full",
        "output=outputs/papers", "threads=3", "device=cpu", "rerun=true",
    ]  # fmt: skip
    told = capsys.readouterr().out
    assert "rank_scaling: measured" in told
    assert "fast_svd: FAILED" in told


def test_what_failed_leaves_no_earlier_result_on_the_page(result):
    settings = command.AllPapers(form="smoke", output=result.settings["output"])
    assert [found.name for found in command.gather(settings)] == [NAME]
    assert command.gather(settings, without=[NAME]) == []


def test_the_page_is_made_of_what_is_there(result, tmp_path, monkeypatch, capsys):
    output = result.settings["output"]
    monkeypatch.setattr(
        sys, "argv",
        ["papers", "measure=false", "form=smoke", f"output={output}", f"page={tmp_path}/page"],
    )  # fmt: skip
    command.register_schema()  # a process that ran the module holds its `__main__`'s
    command.main()
    assert (tmp_path / "page" / "index.html").is_file()
    assert NAME in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("papers=[fast_sdv]", "no reproduction is called 'fast_sdv'; did you mean 'fast_svd'"),
        ("at_once=0", "at_once=0; allowed are integers >= 1, and null"),
        ("form=quick", "form='quick'; allowed are smoke, fast, full"),
    ],
)
def test_what_is_misspelt_is_refused(monkeypatch, capsys, override, message):
    monkeypatch.setattr(sys, "argv", ["papers", "measure=false", override])
    command.register_schema()
    with pytest.raises(SystemExit):
        command.main()
    assert message in capsys.readouterr().err


def test_every_verdict_has_a_colour():
    style = (command.CONFIGURATIONS.parents[1] / "experiments/papers/page.css").read_text()
    for verdict in set(Verdict) - {Verdict.NOT_JUDGED}:
        assert f".verdict.{str(verdict).replace(' ', '-')} " in style
