"""Match regular expressions from files and users in bounded time.

Python's `re` backtracks: an expression such as `(.*)*x!` can take years on one name. The `regex`
package supports the same expressions with a time limit.
"""

from __future__ import annotations

import math
import re
import time
import warnings

import regex

SECONDS = 0.2
"""Time limit of one expression in total, beyond the allowance per name."""

REPETITIONS = 10_000
"""Limit of the product of repetition counts such as `a{3}`, which bounds the memory needed."""

ALLOWANCE = 5e-5
"""Seconds per name that do not count, because models can have 100,000 modules."""


class Expression:
    """A regular expression of a setting, matched against module names.

    Args:
        setting: the setting's name, for messages.
        pattern: an expression in the syntax of Python's `re`.
        prefix, suffix: text that the setting's rule adds around the pattern.

    Raises:
        ValueError: `re` does not accept the pattern.
    """

    def __init__(self, setting: str, pattern: str, prefix: str = "", suffix: str = "") -> None:
        self.setting, self.pattern = setting, pattern
        self._left = SECONDS
        counts = re.findall(r"\{(\d*),?(\d*)\}", pattern)
        if math.prod(max(1, *(int(n[:9] or 1) for n in pair)) for pair in counts) > REPETITIONS:
            raise ValueError(
                f"{setting}={pattern!r} is not supported: its repetitions must multiply to at most "
                f"{REPETITIONS:,}. Repeat by * or +."
            )
        try:
            re.compile(prefix + pattern + suffix)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `re` has warned already
                self._compiled = regex.compile(_for_regex(prefix + pattern + suffix), regex.V0)
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"{setting}: {pattern!r} is not a regular expression ({reason})"
            ) from error

    def match(self, name: str) -> regex.Match | None:
        """Match like `re.match`.

        Raises:
            ValueError: the expression takes too long.
        """
        return self._timed(self._compiled.match, name)

    def fullmatch(self, name: str) -> regex.Match | None:
        """Match like `re.fullmatch`; raises as `match`."""
        return self._timed(self._compiled.fullmatch, name)

    def _timed(self, match, name: str) -> regex.Match | None:
        start = time.thread_time()
        try:
            found = match(name, timeout=self._left, concurrent=False)
            spent = time.thread_time() - start
            self._left = min(SECONDS, self._left + ALLOWANCE - spent)
            if self._left <= 0:
                raise TimeoutError
        except (TimeoutError, MemoryError) as error:
            raise ValueError(
                f"{self.setting}={self.pattern!r} is not supported: must be a regular expression "
                f"that matches module names in linear time, and it takes longer than {SECONDS} s "
                f"at {name!r}. Remove nested repetitions such as (.*)* from it."
            ) from error
        return found


def _for_regex(pattern: str) -> str:
    """Escape syntax that only `regex` interprets, such as `{e<2}` and `[[:x:]]`."""
    return re.sub(
        r"(\\.)|(\[)\[:|\{(?!\d*,?\d*\})",
        lambda found: found[1] or (r"[\[:" if found[2] else r"\{"),
        pattern,
        flags=re.DOTALL,
    )
