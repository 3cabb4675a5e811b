"""When a generated text is a right answer: a rule that comes with the data.

A judge is a function of the text and of the example it was generated for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments.answers import extract_number

if TYPE_CHECKING:
    from experiments.data.examples import Completion

Judge = Callable[[str, "Completion"], bool]


def says_exactly(text: str, example: Completion) -> bool:
    """The text is the answer, letter by letter; where reasoning is learnt, what follows `####`."""
    said = text.rpartition("####")[2] if example.reasoning else text
    return said.strip() == example.answer.strip()


def says_the_number(text: str, example: Completion) -> bool:
    """The number that the text gives as its answer (`experiments.answers`) is the example's.

    An example whose answer is no number (a formula) has to be met letter by letter, after the last
    statement of an answer.
    """
    expected = extract_number(f"answer is {example.answer}")
    if expected is None:
        return text.rpartition("answer is")[2].strip(" :.\n") == example.answer.strip(" :.\n")
    return extract_number(text) == expected
