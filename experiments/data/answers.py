r"""The number that a written solution of a word problem gives as its answer.

The rule, in this order:

1. If the model starts another problem ("### Instruction", "Question:"), the text from there on is
   ignored.
2. An answer is *stated* by "answer is" (or "answer:"), by \boxed{…}, or by a last line "#### 42".
   The last statement that is not empty counts. In its first sentence, the answer is the number
   after the last "=", else the first number. "The answer is: none" gives None.
3. Without a statement, the answer is the last number of the last sentence. This applies only if
   the model ended the text, and not on a question: a text that was cut off has no answer yet.

A number may have a sign, thousands separators, a decimal part, a currency or a unit, and may be a
fraction (3/4, \frac{3}{4}, 1 1/2). A percent sign is a unit: 50% is 50. Numbers are compared
exactly, as fractions: 42 equals 42.0, 3/4 equals 0.75, and 33.33 differs from 100/3.

Deviations: MetaMath's own script counts a text without "The answer is: " as wrong. It also rounds
to integers, so that it accepts 41.6 for 42. GSM8K's answers are integers.
"""

from __future__ import annotations

import re
from fractions import Fraction

GOES_ON = re.compile(r"(?<=\S)\s*(?:###\s*Instruction\b|Below is an instruction\b|\bQuestion:)")
HEADING = re.compile(r"###\s*(?:Instruction|Response)\s*:?")
STATED = re.compile(
    r"\banswer\s*(?:is\b|:)(?:\s*:)?|(?=\\f?boxed\s*\{)|####(?=[^\w\n]*\d[^\n]*\Z)", re.IGNORECASE
)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")
SEPARATED = r"\d{1,3}(?:,\d{3})+(?!\d)"
NUMBER = re.compile(
    rf"""
    (?<![\w.,/])                              # not in the middle of a word or a number
    (?P<sign>(?<![)\]])[-+])?
    (?:
        (?P<whole>\d+)\s+(?P<over>\d+)/(?P<under>\d+)      # 1 1/2
      | (?P<top>\d+)\s*/\s*(?P<bottom>\d+)                 # 3/4
      | (?P<plain>(?:{SEPARATED}|\d+)(?:\.\d+)?|\.\d+)     # 1,234.50
    )
    """,
    re.VERBOSE,
)


def extract_number(text: str, ended: bool = True) -> Fraction | None:
    """The answer of `text` by the rule above, or None.

    Args:
        ended: whether the model ended the text before the limit of tokens.
    """
    own, *others = GOES_ON.split(text, maxsplit=1)
    plain = as_plain(HEADING.sub("\n", own)).strip()
    statements = [said for said in STATED.split(plain)[1:] if said.strip(" \n*:.{}")]
    if statements:
        return stated_number(statements[-1])
    if not (ended or others) or plain.endswith("?"):
        return None
    found = numbers(SENTENCES.split(plain)[-1])
    return found[-1] if found else None


def stated_number(statement: str) -> Fraction | None:
    """The number of a statement's first sentence: after its last "=", else its first."""
    line = statement.strip(" \n*:").partition("\n")[0]
    sentence = SENTENCE_END.split(line, maxsplit=1)[0]
    found = numbers(sentence.rpartition("=")[2]) or numbers(sentence)
    return found[0] if found else None


def numbers(text: str) -> list[Fraction]:
    """All numbers of a plain text, in order."""
    return [value for match in NUMBER.finditer(text) if (value := value_of(match)) is not None]


def value_of(match: re.Match[str]) -> Fraction | None:
    """The number of a match; None for a division by zero."""
    part = match.groupdict()
    sign = -1 if part["sign"] == "-" else 1
    if part["plain"]:
        return sign * Fraction(part["plain"].replace(",", ""))
    above, below = int(part["over"] or part["top"]), int(part["under"] or part["bottom"])
    return sign * (int(part["whole"] or 0) + Fraction(above, below)) if below else None


def as_plain(text: str) -> str:
    """The text without LaTeX, Markdown and currencies around its numbers."""
    text = text.replace("\N{MINUS SIGN}", "-").replace("**", "").replace("{,}", ",")
    text = re.sub(r"\\[,;:! ]", "", text)  # LaTeX's spaces, as in 1\,000
    text = re.sub(r"(?<=\d)(?=\\[dtc]?frac)", " ", text)  # 1\frac{1}{2}
    text = re.sub(r"\\[dtc]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1/\2", text)
    text = re.sub(r"\\[dtc]?frac\s*(\d)\s*(\d)", r"\1/\2", text)
    return re.sub(r"\\?[$€£¥]|\\[()\[\]]", "", text)
