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
        ("table.xlsx", "x", r"must be a file ending in one of \.jsonl"),
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


ENDS = ["\u2028", "\u2029", "\u0085", "\x1c", "\x1d", "\x1e", "\x0b", "\x0c", "\r", "\n", "\u00a0"]
"""What `str.splitlines` cuts, and more; JSON strings may hold most of them as they are."""


@pytest.mark.parametrize("end", ENDS, ids=ascii)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "mark"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n", "\n \r\n"], ids=ascii)
def test_jsonl_of_any_editor(tmp_path, end, mark, line_end):
    """Raw separators in strings, a byte order mark, other line ends, blank lines."""
    path = tmp_path / "pairs.jsonl"
    plain = end >= " "  # JSON escapes control characters
    lines = [
        json.dumps({"q": f"{i}{end}+ 1", "a": f"{i}"}, ensure_ascii=not plain) for i in range(60)
    ]
    path.write_bytes((mark + line_end.join(lines) + line_end).encode())
    splits = load_data(Table(path=str(path), prompt_column="q", completion_column="a"))
    assert len(everything(splits)) == 60
    assert all(example.prompt == f"{example.id}{end}+ 1" for example in everything(splits))


@pytest.mark.parametrize(
    ("line", "told"),
    [(b"{", "line 3: Expecting"), (b"[1]", "line 3 holds a list"), (b"5", "line 3 holds a int"),
     (b'{"q": "\xff"}', "line 3: .*utf-8"), (b'{"q": "a\nb"}', "line 3: Unterminated"),
     (b'{"q": "a", "a": "b", "q": "c"}', "line 3: the key 'q' occurs more than once"),
     (b"[" * 100_000, "line 3: .*nested too deeply"), (b'{"q": "a"} {"q": "b"}', "line 3: Extra"),
     (b"version https://git-lfs.github.com/spec/v1", "line 3: Expecting")],
)  # fmt: skip
def test_a_line_that_is_no_object_is_named(tmp_path, line, told):
    path = tmp_path / "pairs.jsonl"
    good = b'{"q": "x\xe2\x80\xa8y", "a": "b"}'
    path.write_bytes(b"\n".join([good, b"", line, good]))
    with pytest.raises(ConfigurationError, match=rf"(?s)data\.path=.*{told}"):
        load_data(Table(path=str(path), prompt_column="q", completion_column="a"))


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("end", [e for e in ENDS if e != "\r"], ids=ascii)
@pytest.mark.parametrize("quoted", [True, False])
def test_separated_values_of_any_editor(tmp_path, suffix, end, quoted):
    """A byte order mark before a quoted name, line ends in quotes, CRLF, a blank last line."""
    between = {"csv": ",", "tsv": "\t"}[suffix]
    head = f'"text"{between}"label"' if quoted else f"text{between}label"
    rows = [f'"{i}{end}x"{between}{"ab"[i % 2]}' for i in range(60)]
    path = tmp_path / f"t.{suffix}"
    path.write_bytes(("\ufeff" + "\r\n".join([head, *rows]) + "\r\n\r\n").encode())
    splits = load_data(settings(path))
    assert sorted(example.id for example in everything(splits)) == list(range(60))
    assert all(example.text == f"{example.id}{end}x" for example in everything(splits))


@pytest.mark.parametrize(
    ("content", "told"),
    [("text,label\na,b,c\n", "line 2, saw 3"), ("text,label\na,b,\nc,d,\n", "line 2, saw 3"),
     ("text,text\na,b\n", "'text' more than once"), ("", "No columns"),
     ('text,label\n"a,b\n', "EOF inside string"), ("text,label\na\n", "empty"),
     ("text,label\n", "no rows")],
)  # fmt: skip
def test_a_ragged_table_is_refused(tmp_path, content, told):
    """pandas shifts or cuts the columns of some of these without a word."""
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=told):
        load_data(settings(path))
