"""The matrix, its headline, the power of a sweep and the fronts, from synthetic runs."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic_sweeps import long_sentences, no_charts, write_run

from experiments.report import output, page
from experiments.report.__main__ import make
from experiments.report.caveats import caveats
from experiments.report.fronts import fronts
from experiments.report.headline import headline
from experiments.report.judgement import (
    BETTER,
    LARGER,
    NOT_RESOLVED,
    TIE,
    WORSE,
    corrected,
    judge,
)
from experiments.report.matrix import Matrix, first_step_below
from experiments.report.power import Power
from experiments.report.quantities import QUANTITIES, SCORE

QUANTITY = {quantity.name: quantity for quantity in QUANTITIES}
METHODS = ("kaiming", "pissa", "olora")


@pytest.fixture
def without_charts(monkeypatch):
    monkeypatch.setattr(output, "draw", no_charts)
    monkeypatch.setattr(page, "bundle", lambda: "")


def edit(folder, **changes):
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_curve(folder, losses):
    rows = [{"step": 10 * n, "split": "validation", "loss": x} for n, x in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_runs(folder, methods=METHODS, seeds=(0, 1)):
    for method in methods:
        for seed in seeds:
            write_run(folder / f"{method}-{seed}", method, seed, blocks=1, steps=20, ended=True)


@pytest.mark.usefixtures("without_charts")
def test_every_quantity_is_read_from_the_runs(tmp_path):
    """pissa reaches kaiming's last loss early, olora not with every seed; memory is recorded."""
    write_runs(tmp_path)
    losses = {"kaiming": [0.7, 0.6, 0.5], "pissa": [0.7, 0.5, 0.4], "olora": [0.7, 0.6, 0.55]}
    for method in METHODS:
        for seed in (0, 1):
            folder = tmp_path / f"{method}-{seed}"
            write_curve(folder, [x + 0.01 * seed for x in losses[method]])
            start = {"added_memory_bytes": (1 + 80 * (method == "pissa")) * 2**20 + seed}
            if seed or method != "olora":
                start["first_step_error"] = 0.9 - 0.3 * (method == "pissa") + 0.001 * seed
            edit(folder, start=start)
    write_curve(tmp_path / "olora-1", [0.7, 0.5, 0.5])
    report = make([tmp_path], tmp_path / "report")
    pissa, olora = (report.matrix.at("rotten_tomatoes", arm) for arm in ("pissa", "olora"))
    assert pissa["steps_to_baseline"].value == pytest.approx(10 / 20)
    assert pissa["validation_loss"].value == pytest.approx((0.4 / 0.5 * 0.41 / 0.51) ** 0.5)
    assert pissa["added_memory_bytes"].value == pytest.approx(80 * 2**20)
    assert pissa["added_memory_bytes"].verdict == WORSE
    assert olora["added_memory_bytes"].verdict == TIE
    assert olora["steps_to_baseline"].verdict == NOT_RESOLVED
    assert "no run of olora" in olora["steps_to_baseline"].reason
    assert pissa["first_step_error"].value == pytest.approx(2 / 3, rel=1e-3)
    assert report.matrix.absent == []
    text = (tmp_path / "report" / "table.md").read_text()
    assert "| not reached not resolved |" in text
    assert "What it would take: accuracy" in text
    assert "not reached" in report.page.read_text()


def test_the_step_at_which_a_loss_is_reached_is_interpolated():
    curve = pd.Series([1.0, 0.8, 0.4], index=[0, 10, 20])
    assert first_step_below(curve, 0.6) == 15
    assert first_step_below(curve, 1.0) == 0
    assert np.isnan(first_step_below(curve, 0.3))


@pytest.mark.usefixtures("without_charts")
def test_a_start_from_the_cache_has_no_time(tmp_path):
    write_runs(tmp_path)
    for seed in (0, 1):
        path = tmp_path / f"pissa-{seed}" / "init.json"
        init = json.loads(path.read_text())
        init["layers"][0]["details"] = {"from_cache": True}
        path.write_text(json.dumps(init))
    report = make([tmp_path], tmp_path / "report")
    assert report.matrix.at("rotten_tomatoes", "pissa")["init_seconds"].verdict == NOT_RESOLVED
    assert report.matrix.at("rotten_tomatoes", "olora")["init_seconds"].verdict == WORSE


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
@pytest.mark.usefixtures("without_charts")
def test_one_seed_or_a_missing_run_is_said(tmp_path, seeds):
    write_runs(tmp_path, seeds=seeds)
    if len(seeds) > 1:
        (tmp_path / "olora-1" / "result.json").unlink()
    report = make([tmp_path], tmp_path / "report")
    found = report.matrix.of(SCORE)
    html = report.page.read_text()
    if len(seeds) == 1:
        assert {one.verdict for one in report.matrix.judgements} == {NOT_RESOLVED}
        assert "One seed: no difference" in html
        assert report.headline[0].startswith("No quantity")
        assert "unknown: one seed" not in report.headline[2]
    else:
        assert np.isfinite([one.low for one in found]).all()


def judged(matrix, name, verdicts, value=2.0):
    """The matrix with these verdicts for one quantity, and the same value for each arm."""
    quantity = QUANTITY[name]
    first = matrix.judgements[0]
    return [
        replace(first, quantity=quantity, arm=f"m{n}", verdict=verdict, value=value,
                factor=quantity.ratio)
        for n, verdict in enumerate(verdicts)
    ]  # fmt: skip


@pytest.mark.usefixtures("without_charts")
def test_the_headline_says_what_the_verdicts_say(tmp_path):
    write_runs(tmp_path)
    matrix = make([tmp_path], tmp_path / "report").matrix
    found = [
        *judged(matrix, "score", [NOT_RESOLVED] * 4, 0.01),
        *judged(matrix, "forgetting", [WORSE, WORSE, TIE, NOT_RESOLVED]),
        *judged(matrix, "added_memory_bytes", [TIE] * 4),
    ]
    first, second, third = headline(Matrix(found, [QUANTITY["update_size"]]), [], "accuracy")
    assert first == "Different from kaiming. Forgetting: m0 and m1 worse, most m0 (×2.0)."
    assert second.startswith("Tied, within the margin: forgetting (m2, ±10 %) and memory of the")
    assert second.endswith(" (all 4, ±16 MiB).")
    assert third == (
        "Not resolved: accuracy (all 4) and forgetting (m3). Not measured: size of the update."
    )
    found += [
        *judged(matrix, "update_size", [LARGER] * 5),
        *judged(matrix, "init_seconds", [WORSE] * 4 + [BETTER, TIE]),
        *judged(matrix, "first_step_error", [BETTER]),
    ]
    assert headline(Matrix(found), [], "accuracy")[0] == (
        "Different from kaiming. Size of the update: all 5 larger, most m0 (×2.0). Seconds of the "
        "start: 4 of 6 worse; m4 better, most m0 (×2.0). Forgetting: m0 and m1 worse, most m0 "
        "(×2.0). Error of the first step: m0 better (×2.0)."
    )
    first, second, _ = headline(Matrix(judged(matrix, "score", [NOT_RESOLVED])), [], "accuracy")
    assert first == "No quantity of any method differs from kaiming’s beyond doubt."
    assert second == "Tied: nothing. No interval lies within its margin."


@pytest.mark.usefixtures("without_charts")
def test_generated_sentences_are_short(tmp_path):
    """The texts about a sweep with every quantity, each resolved, tied and not resolved."""
    write_runs(tmp_path)
    report = make([tmp_path], tmp_path / "report")
    arms = [WORSE, WORSE, TIE, NOT_RESOLVED]
    judgements = [one for name in QUANTITY for one in judged(report.matrix, name, arms)]
    every = Matrix(judgements)
    texts = [
        *headline(every, [replace(POWER, task="rotten_tomatoes")], "exact match"),
        *headline(Matrix(judgements[:4], list(QUANTITY.values())[1:]), [], "accuracy"),
        *caveats(report.rows, every, 2, 1000),
    ]
    assert long_sentences(texts) == []


POWER = Power(
    SCORE, "task", factor=False, arms=8, comparisons=7, seeds=2, examples=1000, shared=0.0,
    between_seeds=2e-4, between_examples=0.1, rest=0.1, seconds=36.0,
)  # fmt: skip


def test_the_power_of_a_sweep_is_found_in_simulated_ones():
    """The smallest difference that two seeds resolve is called in four of five sweeps."""
    power = replace(POWER, examples=None, between_examples=0.0, rest=0.0)
    generator = np.random.default_rng(0)
    sharp = replace(SCORE, margin=0.0)
    arms = [f"m{n}" for n in range(8) for _ in range(2)]
    pairs, called = dict.fromkeys([f"m{n}" for n in range(1, 8)], "m0"), 0
    for _ in range(600):
        values = generator.normal(0, 1e-2, 16)
        values[2:4] += power.least(2)
        called += corrected(judge(arms, [0, 1] * 8, values, sharp, pairs))[0].differs
    assert called / 600 == pytest.approx(0.8, abs=0.06)


def test_what_a_difference_would_take_is_the_least_that_resolves_it():
    for difference in (0.005, 0.01, 0.02):
        seeds, examples = POWER.both_for(difference)
        assert POWER.least(seeds, examples) <= difference < POWER.least(seeds - 1, examples)
        alone = POWER.seeds_for(difference)
        if alone is None:
            assert POWER.least(10**5) > difference
        else:
            assert POWER.least(alone) <= difference < POWER.least(alone - 1)
    assert POWER.seeds_for(0.005) is None, "the examples alone leave more"
    assert POWER.hours(10) == pytest.approx(10 * 8 * 36 / 3600)
    assert np.isnan(POWER.least(1))
    widths = [POWER.half_width(seeds) for seeds in (2, 3, 5, 9, 50)]
    assert widths == sorted(widths, reverse=True)


def test_fronts_mark_what_nothing_dominates():
    """By a plain loop over all pairs of points."""
    generator = np.random.default_rng(7)
    rows = [
        {"task": "t", "arm": arm, "method": arm, "rank": 8.0, "learning_rate": rate, "seed": seed,
         "curve": generator.random(), "forgetting": generator.random()}
        for arm in "abc" for rate in (1, 2, 3, 4) for seed in (0, 1)
    ]  # fmt: skip
    rows = [row for row in rows if (row["arm"], row["learning_rate"], row["seed"]) != ("a", 1, 1)]
    found = fronts(pd.DataFrame(rows))
    assert len(found) == 11, "a rate with fewer seeds than the others is left out"
    for row in found.itertuples():
        others = found.drop(row.Index)
        dominated = (others["learned"] > row.learned) & (others["forgetting"] < row.forgetting)
        assert row.leads == (not dominated.any())
        assert row.on_front == (not dominated[others["arm"] == row.arm].any())
    assert fronts(pd.DataFrame(rows).assign(forgetting=np.nan)).empty
