"""Texts of the user's for calibration: read whole, or refused by line."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from experiments.config.inputs import CalibrationConfig
from experiments.data.calibration_texts import texts_of
from experiments.errors import ConfigurationError
from experiments.run.start import calibration_batches
from experiments.tasks.causal_lm import CausalLM


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "1+1", "answer": ["2"]}\n\n{"question": "22+22"}\n')
    return path


def test_batches_are_the_texts(questions, configured, tiny_decoder):
    run = configured(
        f"calibration.path={questions}", "calibration.samples=2", "calibration.batch_size=1"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    task = CausalLM(tokenizer, max_length=16, generate_limit=0, max_new_tokens=1)
    data = type("Data", (), {"train": [], "task_type": "CAUSAL_LM"})
    batches = list(calibration_batches(run, data, task, "cpu"))
    texts = {tokenizer.decode(batch["input_ids"][0]) for batch in batches}
    assert texts == {"1+1[EOS]", "22+22[EOS]"}
    # All of it is learnt: methods that mask unlearnt positions see all of it too.
    assert all((batch["labels"] != -100).all() for batch in batches)


@pytest.mark.parametrize(
    ("content", "field", "named"),
    [
        ('{"question": "?"}\n{"querstion": "?"}', "question", "line 2 .*did you mean 'querstion'"),
        ('{"question": "?"}', "text", "calibration.field='text'.*it has question"),
        ('{"question": " "}', "question", "line 1"),
        ("question: ?", "question", "JSON lines: line 1: Expecting value"),
        ("[1]", "question", "it has none"),
        ("\n", "question", "no lines"),
    ],
)
def test_a_line_without_its_text_is_refused(tmp_path, content, field, named):
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=named):
        texts_of(CalibrationConfig(path=str(path), field=field), "CAUSAL_LM")


def test_a_missing_file_and_a_task_with_labels_are_refused(questions):
    with pytest.raises(ConfigurationError, match="calibration.path='nowhere': no such file"):
        texts_of(CalibrationConfig(path="nowhere"), "CAUSAL_LM")
    with pytest.raises(ConfigurationError, match="for language models"):
        texts_of(CalibrationConfig(path=str(questions)), "SEQ_CLS")
