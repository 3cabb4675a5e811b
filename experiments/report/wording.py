"""What the page says in sentences. Every number in them is computed."""

from __future__ import annotations

import os
from typing import Any

from .runs import Run
from .settings import flatten, one_learning_rate
from .statistics import Interval
from .summary import BASELINE, Row

ONE_RATE = "one learning rate: a demonstration, not a ranking"
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def heading(runs: list[Run], given: str | None) -> str:
    """The page's headline. At one learning rate a method it warns, whatever the sweep is called."""
    if one_learning_rate(runs):
        return ONE_RATE
    count = len({run.method for run in runs})
    return given or f"{number(count)} initialization{'s' * (count != 1)} compared"


def findings(rows: list[Row], majority: float | None) -> list[str]:
    """The result in two or three sentences, ties called ties."""
    sentences = []
    baseline = next((row for row in rows if row.is_baseline), None)
    if baseline:
        above = ""
        if majority is not None:
            points = 100 * (baseline.score.estimate - majority)
            side = "above" if points >= 0 else "below"
            above = f", {abs(points):.1f} points {side} the majority class ({percent(majority)})"
        sentences.append(
            f"{BASELINE}, the baseline, scores {percent_interval(baseline.score)}{above}."
        )
    compared = [row for row in rows if row.difference is not None]
    if compared:
        ties = [row for row in compared if row.verdict == "tie"]
        clear = [row for row in compared if row.verdict in ("above", "below")]
        if not clear:
            if len(compared) == 1:
                sentences.append(
                    f"{compared[0].arm} is a tie with it: the difference lies inside its 95 % "
                    "interval."
                )
            else:
                sentences.append(
                    f"Every one of the other {number(len(compared))} is a tie with it: "
                    "each difference lies inside its 95 % interval."
                )
        else:
            parts = [f"{row.arm}, {points_interval(row.difference)}" for row in clear]
            sentences.append(f"Different from it: {'; '.join(parts)}.")
            if ties:
                tied = listing([row.arm for row in ties])
                are, whose = ("is a tie", "its") if len(ties) == 1 else ("are ties", "each")
                sentences.append(
                    f"{tied} {are} with it: {whose} difference lies inside its 95 % interval."
                )
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def caveats(rows: list[Row], seeds: list[int], examples: int | None) -> list[str]:
    """What the intervals mean, and what they do not."""
    held_out = f"the {examples:,} held-out examples" if examples else "the held-out examples"
    lines = [
        f"Intervals are 95 % percentile bootstrap intervals: {held_out} and the seeds are drawn "
        "again with replacement 2,000 times, the same draw for every method.",
        f"A difference to {BASELINE} is taken within each draw. Where its interval contains zero "
        "the report calls it a tie: not proof that the two are equal, only that these runs "
        "cannot tell them apart.",
    ]
    count = len(seeds)
    if count == 1:
        lines.append("One seed: the intervals say nothing about how a different seed would do.")
    elif count < 5:
        share = 100 * (count - 1) / count
        lines.append(
            f"{number(count).capitalize()} seeds are few: resampling them shows about "
            f"{share:.0f} % of the true variance between seeds, so the intervals are somewhat "
            "too narrow."
        )
    compared = sum(row.difference is not None for row in rows)
    if compared > 1:
        chance = 100 * (1 - 0.95**compared)
        lines.append(
            f"{number(compared).capitalize()} comparisons at 95 %: if all methods were equal and "
            f"the comparisons independent, the chance of at least one false difference would be "
            f"{chance:.0f} %."
        )
    return lines


def rate_caveat(runs: list[Run]) -> str | None:
    if not one_learning_rate(runs):
        return None
    return (
        "Each method ran at a single learning rate. The best rate differs between "
        "initializations, by a factor of ten and more, so a method that loses here may win at its "
        "own rate. This page shows that the machinery works and what each start looks like; it "
        "does not rank the methods."
    )


def facts(runs: list[Run]) -> list[tuple[str, str]]:
    """Model, data, budget and machine, in words."""
    items = []
    for key, label, show in (
        ("model", "Model", str),
        ("data", "Data", str),
        ("n_test", "Held out", lambda n: f"{int(n):,} examples"),
        ("metric", "Score", lambda m: str(m).replace("_", " ")),
        ("steps", "Training", lambda n: f"{int(n):,} steps"),
        ("learning_rate", "Learning rate", lambda x: f"{x:g}"),
        ("rank", "Rank", lambda n: f"{n:g}"),
    ):
        values = distinct(run.result.get(key) for run in runs)
        if values:
            items.append((label, listing([show(v) for v in values])))
    items.append(("Seeds", listing([str(s) for s in sorted({run.seed for run in runs})])))
    machines = distinct(machine(run.result.get("environment") or {}) for run in runs)
    if machines:
        items.append(("Machine", "; ".join(machines)))
    seconds = [float(run.result.get("train_seconds") or 0) for run in runs]
    if any(seconds):
        items.append(("Training time", f"{sum(seconds) / 60:.1f} minutes in all"))
    return items


def machine(environment: dict[str, Any]) -> str | None:
    """The processor, its threads, the accelerator and the versions that matter, if recorded."""
    flat = {key.rsplit(".", 1)[-1].lower(): value for key, value in flatten(environment)}

    def first(*keys: str) -> str | None:
        return next((str(flat[k]) for k in keys if flat.get(k) not in (None, "", [])), None)

    parts = [first("gpu", "cuda_device", "device_name", "accelerator"), first("cpu", "processor")]
    cores = first("threads", "num_threads", "torch_threads", "cpu_count", "cores")
    parts.append(f"{cores} threads" if cores else None)
    system = first("platform", "system", "os")
    parts.append(system and system.partition("-")[0])  # "Linux-6.1.0-…": the kernel is in the run
    for package in ("python", "torch"):
        version = first(package, f"{package}_version")
        parts.append(f"{package} {version}" if version else None)
    commit = first("git_commit", "commit", "git", "revision")
    changed = " with changes" if flat.get("git_dirty") else ""
    parts.append(f"commit {commit[:10]}{changed}" if commit else None)
    return ", ".join(part for part in parts if part) or None


def notes(runs: list[Run]) -> list[tuple[str, str]]:
    """Each distinct note with the runs it was made for."""
    methods: dict[str, list[str]] = {}
    for run in runs:
        for note in run.result.get("notes") or []:
            methods.setdefault(str(note), []).append(run.method)
    return [
        (note, "all runs" if len(named) == len(runs) else listing(distinct(named)))
        for note, named in methods.items()
    ]


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def percent_interval(interval: Interval) -> str:
    if interval.low != interval.low:
        return percent(interval.estimate)
    return f"{100 * interval.estimate:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points_interval(interval: Interval) -> str:
    low, high = 100 * interval.low, 100 * interval.high
    return f"{signed(100 * interval.estimate)} points [{signed(low)}, {signed(high)}]"


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else f"{count:,}"


def listing(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def distinct(values) -> list:
    return list(dict.fromkeys(v for v in values if v is not None))


def relative(path: str | os.PathLike, start: str | os.PathLike) -> str:
    """`path` as seen from `start`; absolute where no relative path exists (another drive)."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return os.path.abspath(path)
