"""Judges: when a generated text is a right answer. Each data source chooses one."""

from __future__ import annotations

from .answers import extract_number
from .examples import Completion, Generated


def says_exactly(said: Generated, example: Completion) -> bool:
    """The text equals the answer; with reasoning, only the part after `####` is compared."""
    text = said.text.rpartition("####")[2] if example.reasoning else said.text
    return text.strip() == example.answer.strip()


def says_the_number(said: Generated, example: Completion) -> bool:
    """The number that the text gives as its answer (`experiments.data.answers`) is right.

    If the example's answer is not a number but a formula, the text after its last "answer is" must
    equal it.
    """
    expected = extract_number(f"answer is {example.answer}")
    if expected is None:
        stated = said.text.rpartition("answer is")[2]
        return stated.strip(" :.\n") == example.answer.strip(" :.\n")
    return extract_number(said.text, said.ended) == expected
