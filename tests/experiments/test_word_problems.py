"""MetaMathQA's and GSM8K's files in their formats: what is on which side, and what is missing."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from experiments.data import load_data
from experiments.data.examples import Generated
from experiments.data.gsm8k import Gsm8k
from experiments.data.judges import says_the_number
from experiments.data.metamath import MetaMath, template_of
from experiments.data.word_problems import read_rows
from experiments.errors import ConfigurationError
from experiments.run.folder import identify

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response: Let's think step by step."
)


def originals(splits, rows, name) -> set[str]:
    return {rows[example.id]["original_question"] for example in getattr(splits, name)}


def test_no_original_question_is_on_both_sides(word_problems):
    rows = json.loads((word_problems / "MetaMathQA-395K.json").read_text())
    config = MetaMath(path=str(word_problems), train_limit=None, validation_share=0.3)
    splits = load_data(config)
    train, validation = (originals(splits, rows, name) for name in ("train", "validation"))
    assert train
    assert validation
    assert not train & validation
    # Backward rows have an x for a number: the problem is the same.
    assert not {template_of(text) for text in train} & {template_of(text) for text in validation}
    assert len(splits.validation) == len(validation)  # one an original
    assert {rows[example.id]["type"] for example in splits.validation} <= {
        "GSM_AnsAug", "GSM_Rephrased",
    }  # fmt: skip
    # All that is not held out is trained on, in the file's order.
    held_out = {template_of(text) for text in validation}
    expected = [
        i for i, r in enumerate(rows) if template_of(r["original_question"]) not in held_out
    ]
    seen = [example.id for example in splits.train]
    assert seen == sorted(seen)
    assert set(seen) <= set(expected)
    few = load_data(MetaMath(path=str(word_problems), train_limit=5, validation_share=0.3))
    assert list(few.train) == list(splits.train[:5])


def test_an_x_stands_for_a_number():
    forward = "Ann has 12 pens and buys $3.50 worth, 1,000 in all."
    assert template_of(forward) == template_of(forward.replace("12", "x"))
    assert template_of(forward) != template_of(forward.replace("pens", "caps"))


def test_metamath_rows_are_prompt_reasoning_and_answer(word_problems):
    rows = json.loads((word_problems / "MetaMathQA-395K.json").read_text())
    for example in load_data(MetaMath(path=str(word_problems), train_limit=None)).train:
        row = rows[example.id]
        assert example.prompt == PROMPT.format(row["query"])
        assert example.reasoning + example.answer == " " + row["response"]
        assert example.reasoning.endswith("The answer is:")


def test_a_row_without_an_answer_is_learnt_whole(tmp_path, word_problems):
    rows = json.loads((word_problems / "MetaMathQA-395K.json").read_text())
    rows[0]["response"] = "It cannot be said."
    (tmp_path / "MetaMathQA-395K.json").write_text(json.dumps(rows))
    (tmp_path / "test.jsonl").write_bytes((word_problems / "test.jsonl").read_bytes())
    first = load_data(MetaMath(path=str(tmp_path), validation_share=0.0)).train[0]
    assert (first.reasoning, first.answer) == (" It cannot be said.", "")


def test_long_rows_can_be_left_out(word_problems):
    whole = load_data(MetaMath(path=str(word_problems), validation_share=0.0))
    lengths = sorted(len(e.prompt) - len(PROMPT.format("")) + len(e.reasoning + e.answer)
                     for e in whole.train)  # fmt: skip
    limit = lengths[len(lengths) // 2]
    short = load_data(MetaMath(path=str(word_problems), validation_share=0.0, max_characters=limit))
    assert len(short.train) == sum(length <= limit for length in lengths)


@pytest.mark.parametrize("source", [MetaMath, Gsm8k])
def test_gsm8ks_test_set_is_scored_by_number(word_problems, source):
    lines = (word_problems / "test.jsonl").read_text().splitlines()
    splits = load_data(source(path=str(word_problems)))
    assert splits.judge is says_the_number
    assert splits.task_type == "CAUSAL_LM"
    assert len(splits.test) == len(lines)
    assert not {e.id for e in splits.test} & {e.id for e in [*splits.train, *splits.validation]}
    by_question = {json.loads(line)["question"]: json.loads(line)["answer"] for line in lines}
    for example in splits.test:
        question = example.prompt.split("Instruction:\n")[1].split("\n\n###")[0]
        gold = by_question[question].split("#### ")[1]
        assert example.answer == " " + gold.replace(",", "")
        assert "<<" not in example.reasoning
        assert example.reasoning.endswith("\nThe answer is:")
        assert says_the_number(Generated(example.reasoning + example.answer), example)
        assert not says_the_number(Generated(example.reasoning + example.answer + "1"), example)


def test_gsm8k_is_split_by_question(word_problems):
    splits = load_data(Gsm8k(path=str(word_problems), validation_share=0.4))
    train, validation = ({e.prompt for e in part} for part in (splits.train, splits.validation))
    assert train
    assert validation
    assert not train & validation
    limited = load_data(
        Gsm8k(path=str(word_problems), validation_share=0.4, train_limit=2, test_limit=1)
    )
    assert list(limited.train) == list(splits.train[:2])
    assert len(limited.test) == 1


def test_the_hubs_parquet_is_read_too(word_problems, tmp_path):
    for split in ("train", "test"):
        lines = (word_problems / f"{split}.jsonl").read_text().splitlines()
        table = pd.DataFrame(map(json.loads, lines))
        table.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    first, second = (load_data(Gsm8k(path=str(path))) for path in (word_problems, tmp_path))
    assert first.fingerprint == second.fingerprint


def test_another_prompt_and_marker(word_problems):
    config = Gsm8k(
        path=str(word_problems), prompt="Q: {query} {not this}\nA:", marker="So:", gap="\n"
    )
    example = load_data(config).test[0]
    assert example.prompt.startswith("Q: ")
    assert example.prompt.endswith(" {not this}\nA:")
    assert example.reasoning.startswith("\n")
    assert example.reasoning.endswith("\nSo:")
    with pytest.raises(ValueError, match=r"data\.prompt='Q:'.*\{query\}"):
        Gsm8k(prompt="Q:")


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("MetaMathQA-395K.json", "MetaMathQA-395K.json.*huggingface.co/datasets/meta-math"),
        ("test.jsonl", "test.jsonl or gsm8k_test.jsonl.*openai/grade-school-math"),
    ],
)
def test_a_missing_file_is_named_with_where_to_get_it(word_problems, tmp_path, missing, named):
    for name in {"MetaMathQA-395K.json", "test.jsonl"} - {missing}:
        (tmp_path / name).write_bytes((word_problems / name).read_bytes())
    with pytest.raises(ConfigurationError, match=rf"data=metamath needs the file {named}") as error:
        load_data(MetaMath(path=str(tmp_path)))
    assert f"data.path={str(tmp_path)!r}" in str(error.value)
    with pytest.raises(ConfigurationError, match="no such folder"):
        load_data(MetaMath(path=str(tmp_path / "elsewhere")))


def test_without_a_folder_the_hub_is_asked(monkeypatch, word_problems):
    asked = []

    def download(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        if repository == "openai/gsm8k":
            raise OSError("no network")
        return str(word_problems / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ConfigurationError, match=r"test\.jsonl: the hub did not give.*data\.path"):
        load_data(MetaMath())
    assert asked == [
        ("meta-math/MetaMathQA", "MetaMathQA-395K.json", "dataset"),
        ("openai/gsm8k", "main/test-00000-of-00001.parquet", "dataset"),
    ]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('[{"query": "?"}]', "row 1 has no text response, type, original_question"),
        ("[{", "not readable as json"),
        ("{}", "expected a list"),
    ],
)
def test_a_damaged_file_is_refused(word_problems, tmp_path, content, named):
    (tmp_path / "MetaMathQA-395K.json").write_text(content)
    (tmp_path / "test.jsonl").write_bytes((word_problems / "test.jsonl").read_bytes())
    with pytest.raises(ConfigurationError, match=named):
        load_data(MetaMath(path=str(tmp_path)))


def test_an_answer_without_its_mark_is_refused(word_problems, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "test.jsonl").write_bytes((word_problems / "test.jsonl").read_bytes())
    with pytest.raises(ConfigurationError, match="row 1 does not end in '#### <number>'"):
        load_data(Gsm8k(path=str(tmp_path)))


def test_an_edited_file_is_another_run(configured, word_problems, tmp_path):
    for name in ("MetaMathQA-395K.json", "test.jsonl"):
        (tmp_path / name).write_bytes((word_problems / name).read_bytes())
    run = configured("data=metamath", f"data.path={tmp_path}")
    before = identify(run).id
    assert identify(run).id == before
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write('{"question": "1 + 1?", "answer": "#### 2"}\n')
    assert identify(run).id != before


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_rows_of_any_editor(tmp_path, suffix, mark):
    path = tmp_path / f"rows.{suffix}"
    rows = [json.dumps({"q": f"{i}\u2028x"}, ensure_ascii=False).encode() for i in range(3)]
    between = b",\r\n" if suffix == "json" else b"\r\n"
    content = between.join(rows)
    path.write_bytes(mark + (b"[" + content + b"]" if suffix == "json" else content + b"\r\n"))
    assert [row["q"] for row in read_rows(path, ["q"])] == [f"{i}\u2028x" for i in range(3)]
