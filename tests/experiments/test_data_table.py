"""The user's own table: read as it is, or refused with the setting to change."""

from __future__ import annotations

import json

import pytest

from experiments.data import load_data
from experiments.data.table import Table
from experiments.errors import ConfigurationError

ROWS = [(f"text number {i}", ("yes", "no", "maybe")[i % 3], f"author {i // 5}") for i in range(60)]


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "table.csv"
    lines = ["text,label,author", *(f'"{t}",{label},{author}' for t, label, author in ROWS)]
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(path, **changes) -> Table:
    given = {"text_column": "text", "label_column": "label", **changes}
    return Table(path=str(path), validation_share=0.2, test_share=0.2, **given)


def everything(splits):
    return [*splits.train, *splits.validation, *splits.test]


def test_csv(csv):
    splits = load_data(settings(csv))
    assert splits.labels == ("maybe", "no", "yes")
    assert sorted(example.id for example in everything(splits)) == list(range(60))
    for example in everything(splits):
        text, label, _ = ROWS[example.id]
        assert (example.text, splits.labels[example.label]) == (text, label)
    assert load_data(settings(csv)) == splits


def test_jsonl_completions(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"question": f"{i} + 1 =", "answer": i + 1} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    splits = load_data(
        Table(path=str(path), prompt_column="question", completion_column="answer", test_share=0.3)
    )
    assert splits.task_type == "CAUSAL_LM"
    example = splits.test[0]
    assert example.prompt == f"{example.id} + 1 ="
    assert example.answer == f" {example.id + 1}"


def test_tsv_with_files_of_their_own(tmp_path):
    for name, count in (("train", 12), ("validation", 3), ("test", 6)):
        rows = [f"{name} {i}\t{('a', 'b')[i % 2]}" for i in range(count)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]))
    splits = load_data(
        settings(
            tmp_path / "train.tsv",
            validation_path=str(tmp_path / "validation.tsv"),
            test_path=str(tmp_path / "test.tsv"),
        )
    )
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (12, 3, 6)
    assert all(example.text.startswith("test") for example in splits.test)
    assert len({example.id for example in everything(splits)}) == 21


def test_groups_stay_together(csv):
    splits = load_data(settings(csv, group_column="author"))
    authors = [
        {ROWS[example.id][2] for example in part}
        for part in (splits.train, splits.validation, splits.test)
    ]
    assert sum(map(len, authors)) == 12


def test_equal_texts_stay_together(tmp_path):
    path = tmp_path / "twice.csv"
    rows = [f"text {i % 30},{('a', 'b')[i % 2]}" for i in range(60)]
    path.write_text("\n".join(["text,label", *rows]))
    splits = load_data(settings(path))
    assert not {e.text for e in splits.train} & {e.text for e in splits.test}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "txt"}, r"text_column='txt'.*did you mean 'text'.*text, label, author"),
        ({"label_column": None}, r"set either data\.text_column and data\.label_column"),
        ({"prompt_column": "text"}, r"set either data\.text_column"),
        ({"group_column": "writer"}, r"group_column='writer'"),
        ({"test_path": "nowhere.csv"}, r"data\.test_path='nowhere.csv': no such file"),
    ],
)
def test_wrong_columns_and_paths(csv, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        load_data(settings(csv, **changes))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.csv", None, "no such file"),
        ("table.xlsx", "x", r"allowed are \.jsonl"),
        ("empty.csv", "text,label\n", "no rows"),
        ("nothing.csv", "", "not readable as csv"),
        ("broken.jsonl", '{"text": "a", "label"', "not readable as jsonl"),
        ("gaps.csv", "text,label\ngood,a\n ,b\n", r"1 row\(s\).*row 2"),
        ("one.csv", "text,label\n" + "".join(f"t{i},a\n" for i in range(40)), "two or more"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        load_data(settings(path))


def test_a_label_that_training_lacks(tmp_path, csv):
    (tmp_path / "test.csv").write_text("text,label\nhello,never\n")
    with pytest.raises(ConfigurationError, match="'never', which no training row has"):
        load_data(settings(csv, test_path=str(tmp_path / "test.csv")))


def test_too_few_rows_to_split(tmp_path):
    (tmp_path / "two.csv").write_text("text,label\nhello,a\nbye,b\n")
    with pytest.raises(ConfigurationError, match=r"data\.(validation|test)_share"):
        load_data(settings(tmp_path / "two.csv"))
