"""Ratios, their intervals and verdicts on known numbers, and whose turn it is."""

import itertools

import pytest
import torch

from experiments.benchmark.ratios import paired_ratio
from experiments.benchmark.rows import Quality, overall, verdict, verdict_below
from experiments.benchmark.timing import Contender, order, take_turns
from experiments.report.statistics import Interval

CPU = torch.device("cpu")


def test_ratio_of_pairs():
    assert paired_ratio([2, 4, 600], [1, 2, 300]) == Interval(2.0, 2.0, 2.0)
    ratio = paired_ratio([1.0, 1.1, 1.2, 9.0, 1.1], [1.0] * 5)
    assert ratio.estimate == 1.1, "a single slow step does not move the median"
    assert 1.0 <= ratio.low < ratio.estimate < ratio.high <= 9.0
    assert paired_ratio([3], [2]) == Interval(1.5, 1.5, 1.5)
    for numerator, denominator in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="no pairs"):
            paired_ratio(numerator, denominator)


def test_interval_covers():
    """Known noise: about 95 of 100 intervals contain the true ratio of 1.3."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(100):
        noise = torch.randn(2, 25, generator=generator).mul(0.1).exp()
        ratio = paired_ratio((1.3 * noise[0]).tolist(), noise[1].tolist())
        hits += ratio.low <= 1.3 <= ratio.high
    assert hits >= 85


def test_verdicts():
    assert verdict(Interval(1.0, 0.98, 1.02), 0.97) == "met"
    assert verdict(Interval(1.0, 0.96, 1.02), 0.97) == "open"
    assert verdict(Interval(0.9, 0.88, 0.96), 0.97) == "missed"
    assert verdict(None, 0.97) is None
    assert verdict(Interval(1.0, 1.0, 1.0), None) is None


def test_overall_verdicts():
    assert overall([None, "met", "open"]) == "open"
    assert overall(["met", "missed", "open"]) == "missed"
    assert overall([None, None]) is None
    assert verdict_below(Interval(1.0, 0.9, 1.1), 1.2) == "met"
    assert verdict_below(Interval(1.0, 0.9, 1.1), 1.0) == "open"
    assert verdict_below(Interval(1.0, 0.9, 1.1), 0.8) == "missed"
    assert verdict_below(None, 1.0) is None
    assert Quality(0.9, limit=0.999, least=True).kept is False
    assert Quality(None, limit=1.0).kept is None


@pytest.mark.parametrize("count", [2, 4])
def test_order_favours_nobody(count):
    names = list("abcd"[:count])
    rounds = [order(names, number) for number in range(count)]
    for place in range(count):
        assert sorted(r[place] for r in rounds) == names
    pairs = [pair for r in rounds for pair in itertools.pairwise(r)]
    assert len(pairs) == len(set(pairs)) == count * (count - 1)


def test_turns_alternate_and_one_may_leave():
    taking = {name: Contender(lambda n: n, lambda n: 10 * n) for name in ("ours", "peft")}
    seen = []
    for turn in take_turns(taking, 3, CPU, "test"):
        seen.append((turn.round, turn.contender, turn.result))
        if turn.round == 1 and turn.contender == "peft":
            del taking["peft"]
    assert seen == [
        (0, "ours", 0), (0, "peft", 0), (1, "peft", 10), (1, "ours", 10), (2, "ours", 20),
    ]  # fmt: skip
