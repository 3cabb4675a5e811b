"""Examples: what a data source consists of, and what a model generates for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Labelled:
    """A text and its class. `id` is the row in the source, by which runs are paired."""

    id: int
    text: str
    label: int


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion: `reasoning + answer` is learned, `answer` is scored."""

    id: int
    prompt: str
    answer: str
    reasoning: str = ""


Example = Labelled | Completion


class Generated(NamedTuple):
    """A generated text, and whether the model ended it before the limit of new tokens."""

    text: str
    ended: bool = True


Judge = Callable[[Generated, Completion], bool]
"""Whether a generated text is a right answer to an example."""
