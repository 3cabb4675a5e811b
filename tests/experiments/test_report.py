"""The report of a synthetic sweep: figures, page, pictures, tables."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic_sweeps import EXAMPLES, STEPS, SYNTHETIC, no_charts, write_run, write_sweep

from experiments.report import output
from experiments.report.__main__ import main, make
from experiments.report.quantities import SCORE
from experiments.report.table import latex

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def report(sweep):
    return make([sweep], sweep / "report")


@pytest.fixture(scope="module")
def html(report):
    return report.page.read_text(encoding="utf-8")


class Resources(HTMLParser):
    """What a browser would load for this page, and the headline."""

    def __init__(self):
        super().__init__()
        self.loaded, self.links, self.ids, self.stack, self.h1 = [], [], [], [], ""

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.stack.append(tag)
        self.loaded += [attrs[k] for k in ("src", "srcset", "data") if attrs.get(k)]
        if "href" in attrs:
            (self.loaded if tag == "link" else self.links).append(attrs["href"])

    def handle_endtag(self, tag):
        self.stack.pop()

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "h1":
            self.h1 += data


def test_table_equals_an_independent_computation(report, sweep):
    """Scores are computed from the files, and the paired intervals from sums of squares."""
    correct = {}
    for method in SYNTHETIC:
        for seed in (0, 1):
            with np.load(
                sweep.parents[1] / "runs" / f"{method}-{seed}" / "predictions.npz"
            ) as file:
                correct[method, seed] = file["correct"][np.argsort(file["id"])].astype(float)
    assert [row.method for row in report.rows] == list(SYNTHETIC)
    values = np.array([[correct[m, seed].mean() for seed in (0, 1)] for m in SYNTHETIC])
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    between_seeds = (rest**2).sum() / (7 * 1)  # 8 methods, 2 seeds
    for row in report.rows:
        mine = np.stack([correct[row.method, seed] for seed in (0, 1)])
        assert row.score.estimate == pytest.approx(mine.mean())
        assert row.score.low < row.score.estimate < row.score.high
        if row.is_baseline:
            continue
        paired = mine - np.stack([correct["kaiming", seed] for seed in (0, 1)])
        seeds, examples = 2 * between_seeds / 2, paired.mean(0).var(ddof=1) / EXAMPLES
        left = paired - paired.mean(0) - paired.mean(1, keepdims=True) + paired.mean()
        twice = (left**2).sum() / (EXAMPLES - 1) / 2 / EXAMPLES
        total = max(seeds + examples - twice, seeds, examples)
        freedom = total**2 / (seeds**2 / 7 + examples**2 / (EXAMPLES - 1))
        low, high = stats.t.interval(0.95, freedom, paired.mean(), total**0.5)
        judged = report.matrix.at("rotten_tomatoes", row.arm)["score"]
        assert (judged.value, judged.low, judged.high) == pytest.approx((paired.mean(), low, high))
        assert (judged.verdict == "tie") == (max(abs(low), abs(high)) < 0.01)
        assert not (judged.differs and low <= 0 <= high)
    assert len(report.matrix.of(SCORE)) == 7
    runs = pd.read_parquet(report.page.parent / "runs.parquet").groupby("method")
    for row in report.rows:
        mine = runs.get_group(row.method)
        assert row.get("init_seconds") == pytest.approx(mine["init_seconds"].mean())
        assert row.get("output_gap") == pytest.approx(mine["output_gap"].max())
        assert row.get("first_step_gradient_norm") == pytest.approx(
            mine["first_step_gradient_norm"].mean()
        )


def test_page_is_headed_and_complete(html, report):
    page = Resources()
    page.feed(html)
    assert page.h1 == report.headline[0]
    assert "one learning rate: a demonstration, not a ranking" in html
    for method in SYNTHETIC:
        assert f'data-value="{method}"' in html
    for chart in ("loss", "score", "difference", "factors", "power", "cost", "layers"):
        assert f'data-chart="{chart}"' in html
    for words in ("all-MiniLM-L6-v2", "rotten_tomatoes", "120 steps", "0.001", "2 threads",
                  "weights derived from 4-bit values", "2 seeds are few"):  # fmt: skip
        assert words in html


def test_page_loads_nothing(html, report):
    page = Resources()
    page.feed(html)
    assert page.loaded == ["data:,"]
    assert not re.search(r"@import|url\(", html.split("<style>")[1].split("</style>")[0])
    assert "default-src 'none'" in html
    assert html.count("window.vegaEmbed=") == 1, "the libraries are inlined once"
    for link in page.links:
        assert (report.page.parent / link).exists(), link


def test_broken_runs_are_named(html, report):
    left_out = {problem.run: problem.reason for problem in report.problems if problem.fatal}
    assert left_out == {
        "init=pissa seed=7 (runs/pissa-7)": "the sweep marked it 'failed'",
        "init=eva seed=8 (runs/lost)": left_out["init=eva seed=8 (runs/lost)"],
    }
    for name in left_out:
        assert name in html
        assert name in (report.page.parent / "table.md").read_text()


def test_pictures_and_tables_exist(report):
    folder = report.page.parent
    for chart in ("loss", "score", "difference", "factors", "power", "cost", "layers"):
        assert (folder / f"{chart}.svg").read_text().startswith("<svg")
        assert (folder / f"{chart}.pdf").read_bytes().startswith(b"%PDF")
        png = (folder / f"{chart}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 8000, "an empty picture"
    markdown = (folder / "table.md").read_text()
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    tall = 2 + len(SYNTHETIC)
    for table in (lines[:tall], lines[tall : 2 * tall]):
        assert len({line.count("|") for line in table}) == 1
    assert "not resolved" in lines[3]
    tex = (folder / "table.tex").read_text()
    assert tex.count(r"\\") == 2 * (1 + len(SYNTHETIC))
    for sentence in report.headline:
        assert f"- {sentence}" in markdown
        assert f"% {sentence}" in tex
    assert r"\toprule" in tex
    assert latex("3.1e-06") == r"$3.1 \times 10^{-6}$"
    assert latex("a_b ± 3 %") == r"a\_b $\pm$ 3 \%"
    assert len(pd.read_parquet(folder / "layers.parquet")) == 16 * 36
    assert len(pd.read_parquet(folder / "metrics.parquet")) == 16 * (STEPS + 1)


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr(output, "write_pictures", lambda chart, *rest: [chart.name])


@pytest.fixture
def without_charts(monkeypatch):
    monkeypatch.setattr(output, "draw", no_charts)


@pytest.mark.usefixtures("without_charts")
def test_the_better_of_two_rates_is_shown_with_a_warning(tmp_path):
    for rate in (1e-3, 2e-3):
        write_run(tmp_path / f"pissa-{rate}", "pissa", 0, learning_rate=rate)
    write_run(tmp_path / "kaiming", "kaiming", 0)
    report = make([tmp_path], tmp_path / "report")
    assert any("training.learning_rate: 0.001, 0.002" in w for w in report.warnings)
    assert any("chosen by the same test scores" in w for w in report.warnings)
    assert any("one learning rate only: kaiming" in w for w in report.warnings)
    assert any("may lie beyond: pissa" in w for w in report.warnings)
    scores = pd.read_parquet(tmp_path / "report" / "runs.parquet").set_index("run_id")["score"]
    assert [row.arm for row in report.rows] == ["kaiming", "pissa"]
    assert report.rows[1].score.estimate == max(scores["pissa-0.001"], scores["pissa-0.002"])


@pytest.mark.usefixtures("without_charts")
def test_damaged_predictions_are_named_and_leave_no_interval(tmp_path):
    for method in ("kaiming", "pissa", "eva", "olora"):
        write_run(tmp_path / method, method, 0)
    (tmp_path / "kaiming" / "predictions.npz").unlink()
    (tmp_path / "pissa" / "predictions.npz").write_bytes(b"PK")
    np.savez(tmp_path / "eva" / "predictions.npz", id=np.arange(9), correct=np.zeros(9))
    report = make([tmp_path], tmp_path / "report")
    reasons = {problem.run.split(",")[0]: problem.reason for problem in report.problems}
    assert set(reasons) == {"kaiming", "pissa", "eva"}
    assert "0.0000 of its predictions are right" in reasons["eva"]
    without = {row.method for row in report.rows if np.isnan(row.score.low)}
    assert without == {"kaiming", "pissa", "eva"}


@pytest.mark.usefixtures("without_pictures")
def test_constant_and_missing_measurements_are_named(tmp_path):
    for method in ("kaiming", "pissa"):
        for seed in (0, 1):
            write_run(tmp_path / f"{method}-{seed}", method, seed, blocks=1)
            path = tmp_path / f"{method}-{seed}" / "result.json"
            changes = {"init_seconds": 0, "first_step_gradient_norm": None}
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    report = make([tmp_path], tmp_path / "report")
    assert "first gradient" in report.headline[2].split("Not measured: ")[1]
    html = report.page.read_text()
    assert 'data-chart="cost"' not in html
    assert "seconds of the start, pissa: every run has the same value." in html


@pytest.mark.usefixtures("without_charts")
def test_command_line(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([str(sweep), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "left out init=pissa seed=7" in printed
    for method in SYNTHETIC:
        assert re.search(rf"(?m)^ *{method} .*±", printed)
    assert "…" not in printed
    assert max(map(len, printed[printed.index("synthetic  ") :].splitlines()[:-1])) <= 80
    assert re.search(r"(?m)^olora +worse ", printed)
    for start in ("Different from kaiming. Accuracy: ", "Tied, within", "Not resolved: accuracy ("):
        assert f"\n{start}" in printed
    assert printed.strip().endswith(str(tmp_path / "out" / "index.html"))
    assert main([str(tmp_path / "nothing")]) == 1
    assert "no folder" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "experiments.report", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "FOLDER" in done.stdout
