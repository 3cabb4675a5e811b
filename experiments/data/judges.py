"""When a generated text is a right answer: a rule that comes with the data.

A judge is a function of what was generated and of the example it was generated for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from experiments.data.answers import extract_number

if TYPE_CHECKING:
    from experiments.data.examples import Completion


class Generated(NamedTuple):
    """A generated text, and whether the model ended it, or the limit of new tokens did."""

    text: str
    ended: bool = True


Judge = Callable[[Generated, "Completion"], bool]


def says_exactly(said: Generated, example: Completion) -> bool:
    """The text is the answer, letter by letter; where reasoning is learnt, what follows `####`."""
    text = said.text.rpartition("####")[2] if example.reasoning else said.text
    return text.strip() == example.answer.strip()


def says_the_number(said: Generated, example: Completion) -> bool:
    """The number that the text gives as its answer (`experiments.data.answers`) is the example's.

    An example whose answer is no number (a formula) has to be met letter by letter, after the last
    statement of an answer.
    """
    expected = extract_number(f"answer is {example.answer}")
    if expected is None:
        stated = said.text.rpartition("answer is")[2]
        return stated.strip(" :.\n") == example.answer.strip(" :.\n")
    return extract_number(said.text, said.ended) == expected
