"""How long a sweep will still take, by what its finished runs took."""

from __future__ import annotations

from statistics import mean

from experiments.sweep.status.survey import Line

REMAINING = ("running", "missing", "died", "failed")
NOT_REPEATED = ("diverged",)


def seconds_left(lines: list[Line]) -> float | None:
    """Work left, shared by the runs at work now (by one where none is); None: nothing to go by.

        sum over runs of (mean duration of its method) * (share of its steps not done) / workers

    A method without a finished run is taken to last as long as all finished runs on average.
    """
    durations: dict[str | None, list[float]] = {}
    for line in lines:
        if line.seconds is not None:
            durations.setdefault(line.method, []).append(line.seconds)
    known = [seconds for each in durations.values() for seconds in each]
    left = [line for line in lines if line.state in REMAINING and line.reason not in NOT_REPEATED]
    if not left:
        return 0.0
    if not known:
        return None
    workers = max(sum(line.state == "running" for line in lines), 1)
    return sum(mean(durations.get(line.method, known)) * undone(line) for line in left) / workers


def undone(line: Line) -> float:
    return 1.0 - line.step / line.steps if line.step and line.steps else 1.0
