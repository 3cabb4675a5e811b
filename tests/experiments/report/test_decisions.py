"""The page on which start to begin with, and pages of reports that are read back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_sweeps import long_sentences, write_protocol

from experiments.report import output, page
from experiments.report.__main__ import make
from experiments.report.decisions import decide, main, sentences, with_sentences
from experiments.report.judgement import BETTER, WORSE
from experiments.report.published import read_page

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def sweep():
    return read_page(ROOT / "docs" / "protocol.html")


@pytest.fixture(scope="module")
def verdicts():
    return json.loads((ROOT / "docs" / "papers" / "verdicts.json").read_text("utf-8"))


def test_the_page_and_the_readme_are_up_to_date(tmp_path):
    (tmp_path / "docs" / "papers").mkdir(parents=True)
    for name in ("README.md", "docs/protocol.html", "docs/papers/verdicts.json"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    main(tmp_path)
    for name in ("README.md", "docs/which-start.md"):
        written, kept = ((root / name).read_text("utf-8") for root in (tmp_path, ROOT))
        assert written == kept, f"{name}: run `make readme`"
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_the_sentences_of_the_page_are_short():
    page = (ROOT / "docs" / "which-start.md").read_text("utf-8")
    assert long_sentences(line for line in page.splitlines() if not line.startswith("|")) == []


def with_verdict(sweep, arm, quantity, verdict, value=0.05):
    changed = [
        replace(one, verdict=verdict, value=value)
        if (one.arm, one.quantity.name) == (arm, quantity) else one
        for one in sweep.judgements
    ]  # fmt: skip
    return replace(sweep, judgements=changed)


def starts(sweep, verdicts):
    return {one.situation.label: one.start for one in decide(sweep, verdicts)}


def test_a_start_is_named_only_if_it_is_resolved_or_reproduced(sweep, verdicts):
    assert starts(sweep, verdicts)["a float base with data"] == "kaiming"
    better = with_verdict(sweep, "corda", "score", BETTER)
    assert starts(better, verdicts)["a float base with data"] == "corda"
    assert starts(better, verdicts)["a float base without data"] == "kaiming", "corda reads data"
    assert "`corda`" in sentences(better, decide(better, verdicts))[0]
    keeps = with_verdict(sweep, "pissa", "forgetting", BETTER, 0.5)
    assert starts(keeps, verdicts)["a base whose knowledge must stay"] == "pissa"
    learns_less = with_verdict(keeps, "pissa", "score", WORSE, -0.05)
    assert starts(learns_less, verdicts)["a base whose knowledge must stay"] == "kaiming"
    failed = {
        name: [one | {"verdict": "not reproduced"} for one in claims]
        for name, claims in verdicts.items()
    }
    assert starts(sweep, failed)["a 4-bit base without data"] == "not known"


def test_a_claim_that_is_gone_is_refused(sweep, verdicts):
    with pytest.raises(ValueError, match="must begin one statement of 'eva_variance'"):
        decide(sweep, verdicts | {"eva_variance": []})


def test_a_new_page_gives_its_verdicts_back(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "bundle", lambda: "")
    monkeypatch.setattr(output, "write_pictures", lambda chart, *given: [])
    written = write_protocol(tmp_path, methods=("kaiming", "pissa", "olora"), rates=[1e-4, 1e-3],
                             seeds=(0, 1, 2), blocks=1, steps=20)  # fmt: skip
    report = make([written], written / "report")
    found = read_page(report.page)
    assert found.rates == {row.arm: row.choice.learning_rate for row in report.rows}
    assert found.metric == "accuracy"
    known = [one for one in report.matrix.judgements if one.value == one.value]
    ours = {(one.arm, one.quantity.name): one for one in known}
    assert len(found.judgements) == len(ours)
    for one in found.judgements:
        whole = ours[one.arm, one.quantity.name]
        assert one.verdict == whole.verdict
        if whole.low == whole.low:
            assert (one.value, one.low) == pytest.approx((whole.value, whole.low), rel=1e-3)


def test_what_is_no_page_is_refused(tmp_path):
    (tmp_path / "x.html").write_text("<p>")
    with pytest.raises(ValueError, match="must be a page of"):
        read_page(tmp_path / "x.html")
    page = (ROOT / "docs" / "protocol.html").read_text("utf-8")
    (tmp_path / "x.html").write_text(page.replace('"verdicts":{', '"others":{'), encoding="utf-8")
    with pytest.raises(ValueError, match="must have verdicts"):
        read_page(tmp_path / "x.html")
    with pytest.raises(ValueError, match="must have the lines"):
        with_sentences("# no markers", ("a", "b", "c"))
