"""A synthetic sweep over learning rates: the robustness curve, and a page that stays small."""

import json
import re

import numpy as np
import pytest
from scipy import stats
from synthetic_sweeps import write_grid

from experiments.report import output, page, summary
from experiments.report.__main__ import make


def only(names, monkeypatch):
    """Write the files of these charts only, and the page without Vega."""
    monkeypatch.setattr(page, "bundle", lambda: "")  # takes seconds, and is equal for all pages
    write = output.write_pictures
    monkeypatch.setattr(
        output,
        "write_pictures",
        lambda chart, *given: write(chart, *given) if chart.name in names else [],
    )


def test_the_robustness_curve_is_the_mean_with_students_interval(tmp_path, monkeypatch):
    """The labels of the drawn marks equal a computation from the files."""
    only({"robustness"}, monkeypatch)
    rates = [1e-4, 1e-3, 1e-2]
    sweep = write_grid(tmp_path, methods=("kaiming", "pissa"), rates=rates, seeds=(0, 1, 2, 3),
                       blocks=1, steps=20, tested=False)  # fmt: skip
    report = make([sweep], sweep / "report")
    assert set(report.figures) == {"robustness", "page"}
    svg = (sweep / "report" / "robustness.svg").read_text()
    labels = re.findall(
        r"arm: (\w+); task: \w+; learning rate: ([\d.e-]+); validation accuracy, %, mean over "
        r"seeds: ([\d.]+); 95 % from: ([\d.]+); to: ([\d.]+); seeds: (\d)", svg
    )  # fmt: skip
    drawn = {(m, float(rate)): tuple(map(float, rest)) for m, rate, *rest in labels}
    assert set(drawn) == {(m, rate) for m in ("kaiming", "pissa") for rate in rates}
    for (method, rate), (mean, low, high, seeds) in drawn.items():
        values = []
        for path in tmp_path.glob(f"runs/{method}-*/result.json"):
            result = json.loads(path.read_text())
            values += [100 * result["validation_score"]] * (result["learning_rate"] == rate)
        expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
        assert seeds == 4
        assert mean == pytest.approx(np.mean(values), abs=0.006)
        assert (low, high) == pytest.approx(expected, abs=0.012)
    chosen = {row.method: row.choice.learning_rate for row in report.rows}
    best = {m: max(rates, key=lambda rate: drawn[m, rate][0]) for m in ("kaiming", "pissa")}
    assert chosen == best
    twice = {label[:2] for label in labels if labels.count(label) == 2}  # a ring around the dot
    assert {method: float(rate) for method, rate in twice} == best


def test_the_title_of_a_file_names_its_rank_and_task(tmp_path, monkeypatch):
    only({"score", "rank"}, monkeypatch)
    sweep = write_grid(tmp_path, methods=("kaiming", "pissa"), rates=[1e-3], ranks=(8, 32),
                       seeds=(0,), tasks=("r8", "rotten_tomatoes"), blocks=1)  # fmt: skip
    make([sweep], sweep / "report")
    titles = {
        name: re.search(r"Title text '([^']*)'", (sweep / "report" / f"{name}.svg").read_text())[1]
        for name in ("score", "rank")
    }
    assert titles == {
        "score": "Accuracy at the chosen setting (rank 8, r8)",
        "rank": "Accuracy against rank (r8)",
    }


def test_the_caption_of_the_curve_lists_diverged_runs(tmp_path, monkeypatch):
    only(set(), monkeypatch)
    sweep = write_grid(tmp_path, methods=("kaiming", "olora"), rates=[1e-3, 1e-2], seeds=(0, 1, 2),
                       blocks=1, steps=20)  # fmt: skip
    manifest = json.loads((sweep / "manifest.json").read_text())
    for entry in manifest["runs"][-2:]:  # olora at 1e-2
        folder = tmp_path / entry["folder"]
        config = json.loads((folder / "result.json").read_text())["config"]
        (folder / "result.json").unlink()
        (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        failure = {"reason": "diverged", "error": "RunFailed", "message": "the loss is nan"}
        (folder / "failed.json").write_text(json.dumps(failure))
        entry["status"] = "failed"
    (sweep / "manifest.json").write_text(json.dumps(manifest))
    report = make([sweep], sweep / "report")
    assert "because they diverged: olora r=8 at 1e-2 (2 runs)." in report.page.read_text()
    olora = next(row for row in report.rows if row.method == "olora")
    assert olora.choice.learning_rate == 1e-3, "only one of three seeds finished at 1e-2"
    assert sum("diverged: RunFailed" in problem.reason for problem in report.problems) == 2


@pytest.mark.exhaustive
def test_many_runs_make_a_small_page_and_only_what_is_needed_is_read(tmp_path, monkeypatch):
    """Of 240 runs, tables and curves need 2 methods x 2 ranks x 3 seeds."""
    only(set(), monkeypatch)
    read = []
    predictions = summary.read_predictions
    monkeypatch.setattr(
        summary, "read_predictions", lambda *given: (read.append(given[0]), predictions(*given))[1]
    )
    rates = list(np.geomspace(1e-5, 1e-1, 20))
    sweep = write_grid(tmp_path, methods=("kaiming", "pissa"), rates=rates, ranks=(8, 16),
                       blocks=1, steps=20, examples=100)  # fmt: skip
    report = make([sweep], sweep / "report")
    assert len(read) == 12
    html = report.page.read_text(encoding="utf-8")
    assert len(html) < 350_000
    assert report.reused == 0
    again = make([sweep], sweep / "report")
    assert again.reused == 240
    assert repr(again.rows) == repr(report.rows)
    assert again.page.read_text(encoding="utf-8") == html
