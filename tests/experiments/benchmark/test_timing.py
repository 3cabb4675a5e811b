"""Contenders alternate; ratios come from pairs of one round."""

import pytest
import torch

from experiments.benchmark.timing import Contender, alternate, paired_ratio

CPU = torch.device("cpu")


def test_contenders_alternate_and_get_fresh_objects():
    calls = []
    contenders = {
        name: Contender(lambda name=name: calls.append(name) or name, str.upper) for name in "ab"
    }
    turns = list(alternate(contenders, 3, 60.0, CPU))
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert [turn.result for turn in turns] == ["A", "B", "B", "A", "A", "B"]
    assert all(turn.seconds >= 0 for turn in turns)


@pytest.mark.parametrize("least", [1, 2])
def test_no_round_starts_after_the_budget(least):
    contender = {"a": Contender(lambda: None, lambda _: None)}
    assert len(list(alternate(contender, 9, -1.0, CPU, least))) == least


def test_ratio_is_the_median_of_pairs():
    found = paired_ratio([2.0, 4.0, 90.0, 8.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.estimate == 2.0
    assert found.interval[0] == 2.0
    assert found.interval[1] <= 30.0
    assert paired_ratio([3.0], [1.0]).interval is None


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0])])
def test_ratio_refuses_what_does_not_pair(above, below):
    with pytest.raises(ValueError, match="must be equal"):
        paired_ratio(above, below)
