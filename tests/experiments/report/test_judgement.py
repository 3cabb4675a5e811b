"""Verdicts on simulated sweeps, whose truth is known, and on small ones computed by hand."""

import numpy as np
import pytest
from scipy import stats

from experiments.report.judgement import (
    BETTER,
    EXAMPLES_TOO,
    LARGER,
    NOT_RESOLVED,
    SEEDS_ALONE,
    TIE,
    WORSE,
    corrected,
    judge,
)
from experiments.report.pooled import Layout, holm
from experiments.report.quantities import HIGHER, LOWER, NEITHER, Quantity

SWEEPS = 2000
SHARP = Quantity("x", "x", "x", HIGHER, 0.0, ratio=False)


def judged(values, quantity=SHARP, correct=None):
    """The judgements from a mapping of an arm to its value for each seed."""
    rows = [(arm, seed, v) for arm, found in values.items() for seed, v in enumerate(found)]
    baselines = {arm: "kaiming" for arm in values if arm != "kaiming"}
    return corrected(judge(*zip(*rows, strict=True), quantity, baselines, correct))


def simulated(generator, arms, seeds, effects=(), noise=1.0, shift=3.0):
    """A sweep whose seeds shift all arms alike; `effects` are added to the first arms."""
    common = generator.normal(0, shift, seeds)
    values = {"kaiming": common + generator.normal(0, noise, seeds)}
    for number in range(arms - 1):
        effect = effects[number] if number < len(effects) else 0.0
        values[f"m{number}"] = common + effect + generator.normal(0, noise, seeds)
    return values


@pytest.mark.parametrize(("arms", "seeds"), [(8, 2), (3, 3)])
def test_equal_methods_are_called_different_in_at_most_a_twentieth_of_comparisons(arms, seeds):
    generator = np.random.default_rng(1)
    called, intervals, families = 0, 0, 0
    for _ in range(SWEEPS):
        found = judged(simulated(generator, arms, seeds))
        called += sum(one.differs for one in found)
        families += any(one.differs for one in found)
        intervals += sum(not one.low <= 0 <= one.high for one in found)
    compared = SWEEPS * (arms - 1)
    assert called / compared <= 0.05
    # Holm bounds the chance of one error in a sweep; three standard errors of a simulation more.
    assert families / SWEEPS <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / SWEEPS)
    # The intervals themselves are exact, and comparisons of one sweep are correlated.
    assert intervals / compared == pytest.approx(0.05, abs=0.01)


def test_equal_methods_of_a_score_are_rarely_called_different_over_seeds_and_examples():
    """Methods differ on seeds and on examples by chance, and on average over both by nothing."""
    generator = np.random.default_rng(2)
    arms, seeds, examples = 4, 3, 120
    names = ["kaiming", "a", "b", "c"]
    called = compared = outside = 0
    for _ in range(SWEEPS):
        hard = generator.normal(0.5, 0.8, examples)
        own = generator.normal(0, 0.5, (arms, 1, examples))
        luck = generator.normal(0, 0.08, (arms, seeds, 1))
        draws = generator.normal(0, 1, (arms, seeds, examples)) < hard + own + luck
        correct = {(n, s): draws[a, s] for a, n in enumerate(names) for s in range(seeds)}
        values = {name: draws[a].mean(-1) for a, name in enumerate(names)}
        found = judged(values, SHARP, correct)
        assert {one.covers for one in found} == {EXAMPLES_TOO}
        called += sum(one.differs for one in found)
        outside += sum(not one.low <= 0 <= one.high for one in found)
        compared += len(found)
    assert called / compared <= 0.05
    assert outside / compared <= 0.055, "the interval alone, without Holm's correction"


@pytest.mark.parametrize("planted", [1, 2, 3])
def test_planted_differences_are_called_as_often_as_theory_says(planted):
    """Of two methods: the power of the paired t-test, from the noncentral t distribution."""
    generator = np.random.default_rng(planted)
    seeds, called = 5, 0
    error = np.sqrt(2 / seeds)
    for _ in range(SWEEPS):
        (found,) = judged(simulated(generator, 2, seeds, [planted * error]))
        called += found.verdict == BETTER
    limit = stats.t.ppf(0.975, seeds - 1)
    theory = stats.nct.sf(limit, seeds - 1, planted)
    assert called / SWEEPS == pytest.approx(theory, abs=3.5 * np.sqrt(0.25 / SWEEPS))


@pytest.mark.parametrize("planted", [1, 2, 3])
def test_one_planted_difference_among_eight_methods_has_the_power_of_holms_first_and_last_step(
    planted,
):
    generator = np.random.default_rng(10 + planted)
    seeds, others, called = 3, 7, 0
    for _ in range(SWEEPS // 2):
        found = judged(simulated(generator, others + 1, seeds, [planted * np.sqrt(2 / seeds)]))
        called += found[0].verdict == BETTER
    freedom = others * (seeds - 1)
    strict, loose = (
        stats.nct.sf(stats.t.ppf(1 - level / 2, freedom), freedom, planted)
        for level in (0.05 / others, 0.05)
    )
    slack = 3.5 * np.sqrt(0.25 / (SWEEPS // 2))
    assert strict - slack <= called / (SWEEPS // 2) <= loose + slack


@pytest.mark.parametrize("true", [0.0, 0.9, 1.0, 1.5])
def test_a_tie_is_called_only_where_the_margin_is_excluded(true):
    """And of methods that differ by the margin or more, in at most a fortieth of the sweeps."""
    generator = np.random.default_rng(3)
    quantity = Quantity("x", "x", "x", HIGHER, 1.0, ratio=False)
    ties = 0
    for _ in range(SWEEPS // 2):
        (found,) = judged(simulated(generator, 2, 4, [true], noise=0.3), quantity)
        inside = max(abs(found.low), abs(found.high)) < 1
        assert (found.verdict == TIE) == inside
        ties += inside
    if true >= 1:
        assert ties / (SWEEPS // 2) <= 0.025 + 3 * np.sqrt(0.025 / (SWEEPS // 2))
    elif true == 0:
        assert ties / (SWEEPS // 2) > 0.5


def test_the_pooled_variance_is_that_of_the_two_way_layout():
    """A balanced layout by hand: rest = y - arm - seed + total, with (A - 1)(S - 1) of freedom."""
    generator = np.random.default_rng(4)
    values = generator.normal(size=(5, 3))
    arms, seeds = np.repeat([*"abcde"], 3), np.tile(range(3), 5)
    layout = Layout(arms, seeds, values.ravel())
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    assert layout.freedom == 8
    assert layout.variance == pytest.approx((rest**2).sum() / 8)
    between = 5 * values.mean(0).var(ddof=1)
    assert layout.shared == pytest.approx(max((between - layout.variance) / 5, 0))
    found = layout.difference("c", "a")
    assert found.value == pytest.approx(values[2].mean() - values[0].mean())
    assert found.error == pytest.approx(np.sqrt(2 * layout.variance / 3))
    paired = Layout(arms[:6], seeds[:6], values[:2].ravel()).difference("b", "a")
    assert paired.p == pytest.approx(stats.ttest_rel(values[1], values[0]).pvalue)


def test_a_missing_run_is_fitted_around():
    """The seed of the missing run shifts by 100: a difference of plain means would show it."""
    values = {"kaiming": [0.0, 100.1], "a": [1.0, 101.0], "b": [np.nan, 100.9]}
    a, b = judged(values)
    assert b.value == pytest.approx(0.825)  # 100.9 - 100.05 - 0.025
    assert abs(a.value - 0.95) < 1e-9
    assert np.isfinite([b.low, b.high]).all()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"kaiming": [0.7], "a": [0.9]}, "the variance between seeds is unknown"),
        ({"kaiming": [0.7, 0.7], "a": [0.7, 0.7]}, "every run has the same value"),
        ({"kaiming": [0.7, 0.8], "a": [np.nan, np.nan]}, "no run of a has it"),
        ({"kaiming": [np.nan, np.nan], "a": [0.7, 0.8]}, "no run of kaiming has it"),
        ({"kaiming": [0.7, np.nan], "a": [np.nan, 0.8], "b": [0.1, np.nan]}, "unknown"),
        ({"kaiming": [np.inf, np.nan], "a": [0.7, 0.8]}, "no run of kaiming has it"),
    ],
    ids=["one seed", "constant", "NaN", "no baseline", "nothing paired", "infinite"],
)
def test_what_cannot_be_judged_is_not_resolved_and_says_why(values, reason):
    found = judged(values)[0]
    assert found.verdict == NOT_RESOLVED
    assert reason in found.reason
    assert np.isnan([found.low, found.high, found.p]).all()


def test_values_without_any_spread_are_exact():
    better, tied = judged({"kaiming": [1.0, 1.0], "a": [2.0, 2.0], "b": [1.0, 1.0]})
    assert better.verdict == BETTER
    assert (better.low, better.high) == pytest.approx((1, 1))
    assert tied.value == 0
    assert tied.verdict == NOT_RESOLVED, "a margin of zero excludes nothing"


@pytest.mark.parametrize(
    ("direction", "verdicts"),
    [(HIGHER, [BETTER, WORSE]), (LOWER, [WORSE, BETTER]), (NEITHER, [LARGER, "smaller"])],
)
def test_a_factor_is_judged_on_logarithms_and_in_its_direction(direction, verdicts):
    quantity = Quantity("x", "x", "x", direction, 0.1)
    generator = np.random.default_rng(5)
    levels = {"kaiming": 1.0, "up": 3.0, "down": 0.25, "same": 1.0}
    values = {a: v * np.exp(generator.normal(0, 0.01, 4)) for a, v in levels.items()}
    up, down, same = judged(values, quantity)
    assert [up.verdict, down.verdict, same.verdict] == [*verdicts, TIE]
    assert up.factor
    assert up.low < 3 < up.high < 3.2
    assert up.covers == SEEDS_ALONE
    logs = {arm: np.log(found) for arm, found in values.items()}
    assert up.value == pytest.approx(np.exp(logs["up"].mean() - logs["kaiming"].mean()))


def test_a_quantity_with_zeros_is_judged_by_differences_with_a_margin_of_the_baseline():
    quantity = Quantity("x", "x", "x", LOWER, 0.1)
    (found,) = judged({"kaiming": [2.0, 2.02], "a": [0.0, 0.01]}, quantity)
    assert not found.factor
    assert found.margin == pytest.approx(0.201)
    assert found.verdict == BETTER


def test_holm_is_the_textbooks():
    """Holm 1979, by a plain loop, in the order that was given."""
    p = [0.04, 0.001, 0.03, 0.02]
    expected, least = {}, 0.0
    for place, value in enumerate(sorted(p)):
        least = max(least, min(1.0, (len(p) - place) * value))
        expected[value] = least
    assert holm(p) == pytest.approx([expected[value] for value in p])
    assert holm([]) == []
