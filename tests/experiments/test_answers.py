"""The number that a text gives as its answer: by rule, and as a reader took it from real texts."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from experiments.data import Completion
from experiments.data.answers import extract_number
from experiments.data.examples import Generated
from experiments.data.judges import says_exactly, says_the_number

REAL = Path(__file__).parent / "fixtures" / "answers_smollm2.jsonl"

KNOWN_TO_DIFFER = {
    10: 7800,  # says the perimeter that was asked for, then goes on to an area
    24: None,  # was cut off right after its last sentence, which a reader may take for the end
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 3 + 4 = 7 apples.\nThe answer is: 7", 7),
        ("The answer is: 7.", 7),
        ("The answer is 7 apples.", 7),
        ("the final answer is 12", 12),
        ("**Answer:** 12", 12),
        ("The answer is: **12**", 12),
        # marks of GSM8K and of MATH
        ("48 / 2 = <<48/2=24>>24\n#### 24", 24),
        ("So we get \\boxed{18}.", 18),
        ("The answer is: $\\boxed{18}$ because 2 * 9 is 18, not 20", 18),
        ("The answer is:\n\n\\[ 18 \\]", 18),
        # thousands, currencies, units
        ("The answer is: 1,234", 1234),
        ("The answer is: $1,234,567.50.", Fraction("1234567.5")),
        ("The answer is: 1{,}234", 1234),
        ("The answer is: 1\\,234", 1234),
        ("The answer is: \\$18", 18),
        ("The answer is: €5", 5),
        ("The answer is: 50%", 50),
        ("The answer is: 50\\%", 50),
        ("The answer is: 3 hours and 20 minutes", 3),
        ("The answer is: 18 \\text{ dollars}", 18),
        # decimals and signs
        ("The answer is: 42.0", 42),
        ("The answer is: 0.75", Fraction(3, 4)),
        ("The answer is: .5", Fraction(1, 2)),
        ("The answer is: -5", -5),
        ("The answer is: −5", -5),
        ("The answer is: -$5", -5),
        ("The answer is: $-5", -5),
        ("The answer is: +5", 5),
        ("It fell from 5-10", 10),
        # fractions
        ("The answer is: 3/4", Fraction(3, 4)),
        ("The answer is: \\frac{3}{4}", Fraction(3, 4)),
        ("The answer is: $\\dfrac{3}{4}$.", Fraction(3, 4)),
        ("The answer is: \\frac34", Fraction(3, 4)),
        ("The answer is: -\\frac{3}{4}", Fraction(-3, 4)),
        ("The answer is: 1 1/2", Fraction(3, 2)),
        ("The answer is: 1\\frac{1}{2}", Fraction(3, 2)),
        ("The answer is: 12/4", 3),
        ("The answer is: 3/0", None),
        # several candidates
        ("The answer is: 4 * 5 = 20", 20),
        ("The answer is: x = 5", 5),
        ("The answer is: 20. There were 3 of them in 1 box = 3", 20),
        ("The answer is: 5 or 6", 5),
        ("The answer is: 8\nNo, wait. The answer is: 9", 9),
        ("#### 8\nThe answer is: 9", 9),
        ("The answer is: 7\nThe answer is:", 7),
        # headings that look like GSM8K's mark
        ("#### Step 1:\nTake 5.\n#### Step 2:\nTake it twice, so the answer is 10", 10),
        ("#### 1.\nThe answer is 3.5.\n#### 2.\nThe answer is 3.5.", Fraction(7, 2)),
        # no statement: the last number of the last sentence
        ("First 3, then 4, in all 7 apples", 7),
        ("12 - 5 = 7 and 7 * 2 = 14.", 14),
        ("There are 12 apples. Add them up.", None),
        ("There are 12 apples. How many are left of 20?", None),
        # no number
        ("", None),
        ("I do not know.", None),
        ("The answer is: unknown, though there were 5", 5),
        ("There were 5. The answer is: none of them.", None),
        ("Room x2 is free", None),
        # another problem that the model goes on with
        ("The answer is: 7\n\n### Instruction:\nWhat is 1 + 1?\n\n### Response: 2", 7),
        ("7 in all\nQuestion: What is 1 + 1?\nAnswer: 2", 7),
        ("\n### Instruction:\nThe answer is 7.\n\n### Response:\nThe answer is 7.", 7),
        ("It is 7.\n\n### Response:\n", 7),
    ],
)
def test_the_rule(text, expected):
    assert extract_number(text) == expected


def test_a_reader_takes_the_same_from_real_outputs():
    """`read` was put there by who read the outputs, whatever the rule says of them."""
    facts, *rows = map(json.loads, REAL.read_text().splitlines())
    assert facts["model"].startswith("SmolLM2")
    assert "4-bit" in facts["note"]
    assert len(rows) >= 40
    assert sum(row["read"] is not None for row in rows) >= 20
    differing = {}
    for row in rows:
        found = extract_number(row["output"], row["ended"])
        if found != (None if row["read"] is None else Fraction(row["read"])):
            differing[row["id"]] = found
    assert differing == KNOWN_TO_DIFFER


def test_a_text_that_was_cut_off_has_an_answer_only_if_it_states_one():
    assert extract_number("3 + 4 = 7. Then 7 * 2", ended=False) is None
    assert extract_number("The answer is 7. Then 7 * 2", ended=False) == 7
    # What it was cut off in is another problem.
    assert extract_number("It is 7.\nQuestion: What is", ended=False) == 7


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("… The answer is: 1,000.00 dollars", " 1000", True),
        ("… The answer is: 1000.5", " 1000", False),
        ("nothing", " 1000", False),
        ("The answer is: x + 1.", " x + 1", True),
        ("The answer is: x + 2", " x + 1", False),
    ],
)
def test_numbers_are_judged_by_value(said, answer, right):
    assert says_the_number(Generated(said), Completion(0, "?", answer, "…")) is right


def test_other_answers_are_judged_letter_by_letter():
    assert says_exactly(Generated(" 3 "), Completion(0, "1+2=", " 3"))
    assert not says_exactly(Generated("3.0"), Completion(0, "1+2=", " 3"))
    worked = Generated("one and two\n#### 3")
    assert says_exactly(worked, Completion(0, "1+2=", " 3", " worked\n####"))
    assert not says_exactly(worked, Completion(0, "1+2=", " 3"))
