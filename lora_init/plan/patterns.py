"""Regular expressions from files and users, matched in bounded time.

Python's `re` backtracks: an expression such as `(.*)*x!` can take years on one name. The `regex`
package matches the same expressions and has a time limit.
"""

from __future__ import annotations

import math
import re
import time
import warnings

import regex

SECONDS = 0.2
"""What one expression may take in all, on top of the allowance for each name."""

REPETITIONS = 10_000
"""What the counts of an expression, as in `a{3}`, may multiply to: its size in memory."""

ALLOWANCE = 5e-5
"""Seconds that matching one name may take at no charge: models have up to 100,000 modules."""


class Expression:
    """A regular expression of a setting, matched against module names.

    Args:
        setting: its name, for messages.
        pattern: of Python's `re`.
        prefix, suffix: what the rule of the setting puts around the pattern.

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
                warnings.simplefilter("ignore")  # `re` has said it
                self._compiled = regex.compile(_for_regex(prefix + pattern + suffix), regex.V0)
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"{setting}: {pattern!r} is no regular expression ({reason})"
            ) from error

    def match(self, name: str) -> regex.Match | None:
        """As `re.match`.

        Raises:
            ValueError: the expression takes too long.
        """
        return self._timed(self._compiled.match, name)

    def fullmatch(self, name: str) -> regex.Match | None:
        """As `re.fullmatch`; the same error."""
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
    """The pattern without what `regex` reads otherwise: `{e<2}` and `[[:x:]]` are text to `re`."""
    return re.sub(
        r"(\\.)|(\[)\[:|\{(?!\d*,?\d*\})",
        lambda found: found[1] or (r"[\[:" if found[2] else r"\{"),
        pattern,
        flags=re.DOTALL,
    )
