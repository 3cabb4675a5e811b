"""Many names in few words: the layers' numbers collapsed.

`layers.0.mlp.up`, `layers.1.mlp.up` and `layers.2.mlp.up` are `layers.{0..2}.mlp.up (3)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def grouped(names: Iterable[str]) -> list[str]:
    """One entry for all names that differ in their numbers only, in the order of the first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(names):
        pattern = tuple("#" if part.isdecimal() else part for part in name.split("."))
        groups.setdefault(pattern, []).append(name)
    return [_collapsed(pattern, group) for pattern, group in groups.items()]


def _collapsed(pattern: Sequence[str], names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    columns = zip(*(name.split(".") for name in names), strict=True)
    parts = [
        _range(sorted({int(part) for part in column})) if kind == "#" else kind
        for kind, column in zip(pattern, columns, strict=True)
    ]
    return f"{'.'.join(parts)} ({len(names)})"


def _range(numbers: list[int]) -> str:
    """The numbers in braces, runs of three or more as first..last; a single one as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return "{" + ",".join(shown) + "}"
