"""Checks of one setting's type and range, and the error that they raise."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from ..errors import ConfigurationError, nearest

MOST = 2**53
"""The largest integer that JSON, a float and every table of results hold exactly."""
SEEDS = range(-(2**63), 2**63)
LONGEST_SHOWN = 80


def refusal(setting: str, value: object, must_be: str, fix: str = "") -> ConfigurationError:
    """The error for a setting: what it got, what it must be, and the fix."""
    shown = repr(value) if isinstance(value, str) else str(value)
    if len(shown) > LONGEST_SHOWN:
        shown = f"{shown[: LONGEST_SHOWN // 2]}…{shown[-10:]}"
    message = f"{setting}={shown} is not supported: must be {must_be}"
    return ConfigurationError(f"{message}. {fix}." if fix else f"{message}.")


def check_integer(
    setting: str, value: Any, least: int, most: int = MOST, *, null: str | None = None,
    fix: str = "",
) -> None:  # fmt: skip
    """Refuse everything but an integer in a range.

    Args:
        null: what null means for this setting; None if null is not supported.

    Raises:
        ConfigurationError: the value has another type or is out of range.
    """
    if (value is None and null is not None) or (type(value) is int and least <= value <= most):
        return
    limit = f">= {least}" if most == MOST else f"from {least} to {most}"
    raise refusal(setting, value, f"an integer {limit}{or_null(null)}", fix)


def check_number(
    setting: str, value: Any, *, least: float | None = None, above: float | None = None,
    below: float | None = None, null: str | None = None, fix: str = "",
) -> None:  # fmt: skip
    """Refuse everything but a finite number in a range.

    Args:
        least, above, below: the range: value >= least, value > above, value < below.
        null: what null means for this setting; None if null is not supported.

    Raises:
        ConfigurationError: the value has another type, is not finite or is out of range.
    """
    if value is None and null is not None:
        return
    inside = type(value) in (int, float) and is_finite(value)
    inside = inside and (least is None or value >= least)
    inside = inside and (above is None or value > above)
    if inside and (below is None or value < below):
        return
    limits = (("> ", above), (">= ", least), ("< ", below))
    bounds = " and ".join(f"{sign}{limit:g}" for sign, limit in limits if limit is not None)
    kind = "a share" if below == 1 else "a finite number"
    raise refusal(setting, value, f"{kind} {bounds}{or_null(null)}".replace("  ", " "), fix)


def check_choice(setting: str, value: Any, choices: Collection[str], fix: str = "") -> None:
    """Refuse everything but one of the names; the error suggests the nearest one."""
    if not isinstance(value, str) or value not in choices:
        hint = nearest(str(value), choices)
        must_be = f"one of {', '.join(choices)}"
        raise refusal(setting, value, must_be, fix or hint.strip().removesuffix("?"))


def check_switches(group: str, settings: Any, *names: str) -> None:
    """Refuse a switch that is neither true nor false."""
    for name in names:
        if type(getattr(settings, name)) is not bool:
            raise refusal(f"{group}{name}", getattr(settings, name), "true or false")


def check_seed(setting: str, value: Any) -> None:
    """Refuse a seed that does not fit into 64 bits."""
    fix = "A seed has 64 bits; give a smaller one"
    check_integer(setting, value, SEEDS.start, SEEDS.stop - 1, fix=fix)


def check_label(setting: str, value: Any) -> None:
    """Refuse a label for tables and folders that is empty or holds control characters."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise refusal(setting, value, "a name of printable characters")


def check_path(setting: str, value: Any, *, null: str | None = None) -> None:
    """Refuse what the operating system cannot use as a path."""
    if value is None and null is not None:
        return
    if not isinstance(value, str) or not value or "\0" in value:
        raise refusal(setting, value, f"a path, not empty and without NUL{or_null(null)}")


def check_names(setting: str, value: Any, *, null: str | None = None, fix: str = "") -> None:
    """Refuse everything but a name (or a pattern), or a list of them."""
    if value is None and null is not None:
        return
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(n, str) and n for n in given):
        raise refusal(setting, value, f"a name or a list of names{or_null(null)}", fix)


def is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def or_null(null: str | None) -> str:
    return "" if null is None else f", or null ({null})"
