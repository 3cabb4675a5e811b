"""The state of each run that a sweep planned or started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ...run.failures import read_failure
from ...run.files import read_object
from ...run.folder import RunFolder
from ...run.lock import heartbeat
from ...run.state import state_of
from ..jobs import read_jobs, sweep_facts

SWEEPS = Path("outputs") / "sweeps"
REMAINING = ("running", "missing", "died", "failed")


@dataclass(frozen=True)
class Line:
    """A run of a sweep.

    Attributes:
        name: its folder's name, or its overrides while it has no folder.
        method: the initializer, by which durations are compared; None while it is not known.
        state: one of `experiments.run.state.STATES`.
        step, steps, age: of its heartbeat (age in seconds); None without one.
        worker: the host and process that last worked on it.
        reason: why it failed.
        seconds: duration of initialization and training; None unless it is finished.
    """

    name: str
    method: str | None
    state: str
    step: int | None = None
    steps: int | None = None
    age: float | None = None
    worker: str | None = None
    reason: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Survey:
    """A sweep and its runs, in the order of the plan; total is None without a plan."""

    sweep: str
    total: int | None
    lines: list[Line]

    def counted(self) -> dict[str, int]:
        """How many runs are in each state; failed ones by reason."""
        counts: dict[str, int] = {}
        for line in self.lines:
            name = f"failed ({line.reason})" if line.state == "failed" else line.state
            counts[name] = counts.get(name, 0) + 1
        return counts


def find_sweep(given: str) -> Path:
    """The folder of a sweep, from its path or its name under `outputs/sweeps`.

    Raises:
        FileNotFoundError: there is no such sweep.
    """
    candidates = [Path(given), SWEEPS / given]
    for folder in candidates:
        if (folder / "sweep.json").is_file():
            return folder
    known = sorted(path.parent.name for path in SWEEPS.glob("*/sweep.json"))
    raise FileNotFoundError(
        f"no sweep {given!r}: neither {' nor '.join(map(str, candidates))} holds a sweep.json; "
        f"known here: {', '.join(known) or 'none'}"
    )


def survey(folder: Path) -> Survey:
    """Look at every run of the sweep in `folder`."""
    facts = sweep_facts(folder)
    jobs = sorted(read_jobs(folder), key=lambda job: job["job"])
    outputs = folder.resolve().parent.parent
    begun = {tuple(job["overrides"]): inspect(job, outputs) for job in jobs}
    planned = [tuple(job) for job in facts["planned"] or begun]
    lines = [begun.get(job) or not_begun(job) for job in planned]
    lines += staged(folder, {job["run_id"] for job in jobs})
    # A protocol asks for a run twice, to train and to test it.
    distinct = {line.name: line for line in lines}
    return Survey(facts["sweep"], facts["total"], list(distinct.values()))


def inspect(job: dict[str, Any], outputs: Path) -> Line:
    """A job that has started. Its folder is looked up next to the sweep, which may have moved."""
    if job["folder"] is None:
        return Line(" ".join(job["overrides"]), None, "failed", reason="configuration")
    folder = RunFolder(job["run_id"], outputs / "runs" / Path(job["folder"]).name)
    name, method = folder.path.name, folder.path.name.split("-")[0]
    state = state_of(folder)
    if state == "finished":
        result = folder.finished() or {}
        parts = (result.get("init_seconds"), result.get("train_seconds"))
        seconds = sum(part for part in parts if type(part) in (int, float))
        steps = result.get("steps") if type(result.get("steps")) is int else None
        return Line(name, method, state, step=steps, steps=steps, seconds=seconds)
    if state == "missing" and job["status"] == "failed":  # a wrong setting, before it had a folder
        return Line(name, method, "failed", reason="configuration")
    failure = read_failure(folder) if state == "failed" else None
    beat = heartbeat(folder) or {}
    return Line(
        name,
        method,
        state,
        step=beat.get("step"),
        steps=beat.get("steps"),
        age=beat.get("age"),
        worker=f"{beat['host']}:{beat['pid']}" if beat else None,
        reason=failure["reason"] if failure else None,
    )


def not_begun(overrides: Sequence[str]) -> Line:
    method = next((o.partition("=")[2] for o in overrides if o.startswith("init=")), None)
    return Line(" ".join(overrides), method, "missing")


def staged(folder: Path, begun: set[str]) -> list[Line]:
    """Runs of a protocol's stages whose jobs have not started."""
    try:
        runs = {
            run: name
            for stage in read_object(folder / "protocol.json")["stages"]
            for run, name in zip(map(str, stage["runs"]), map(str, stage["folders"]), strict=True)
            if run not in begun
        }
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [Line(name, name.split("-")[0], "missing") for name in runs.values()]


def seconds_left(lines: list[Line]) -> float | None:
    """The remaining time, by the durations of finished runs; None without a finished run.

        sum over runs of (mean duration of its method) * (share of steps not done) / workers

    A method without a finished run is assumed to take as long as the mean of all finished runs.
    """
    durations: dict[str | None, list[float]] = {}
    for line in lines:
        if line.seconds is not None:
            durations.setdefault(line.method, []).append(line.seconds)
    known = [seconds for each in durations.values() for seconds in each]
    # A diverged run is not repeated.
    left = [line for line in lines if line.state in REMAINING and line.reason != "diverged"]
    if not left:
        return 0.0
    if not known:
        return None
    workers = max(sum(line.state == "running" for line in lines), 1)
    return sum(mean(durations.get(line.method, known)) * undone(line) for line in left) / workers


def undone(line: Line) -> float:
    return 1.0 - line.step / line.steps if line.step and line.steps else 1.0
