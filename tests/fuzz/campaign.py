"""Many mutations of everything that is read from disk, and what came of each.

    make fuzz

prints, by kind, how many mutations were refused with the right exception, accepted with the same
result, and accepted with another one, and the faults: readings of more than two seconds, unrelated
exceptions, accepted tensors of a wrong dtype or shape, and models that changed after a refusal.
A fault is shown by its number: `make fuzz FUZZ="--kind adapter --only 123"` repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from mutation import mutate, restore
from run_subjects import SUBJECTS
from subjects import Subject

SECONDS = 2.0
SET_UP_SECONDS = 60.0
PARTS = 2
"""Each kind's share is done in so many processes."""
OUTCOMES = ("refused", "accepted and equal", "accepted otherwise")
FAULTS = ("over 2 s", "unrelated exception", "wrong tensor", "model changed")


class Hang(BaseException):
    """No `except Exception` stops it."""


@dataclass
class Tally:
    """What came of a subject's mutations.

    Attributes:
        faults: number, fault, mutation and what went wrong.
    """

    counts: Counter = field(default_factory=Counter)
    faults: list[tuple[int, str, str, str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.counts += other.counts
        self.faults += other.faults


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again, should the first one be swallowed.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attack(kind: str, numbers: Iterable[int], send: Callable[[Any], None]) -> None:
    """Do the mutations of these numbers to one kind of subject, and send what came of each."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            subject = SUBJECTS[kind](folder / "intact")
            for number in numbers:
                send(number)
                tally = Tally()
                one(subject, folder / "mutated", number, tally)
                send(tally)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def one(subject: Subject, folder: Path, number: int, tally: Tally) -> None:
    """Do one mutation. On a busy machine a reading may take long by chance: it has three tries."""
    tally.counts["mutations"] += 1
    for last in (False, False, True):
        draw = random.Random(f"{subject.kind} {number}")
        restore(folder, subject.intact)
        what = mutate(folder, sorted(subject.intact), draw, subject.seal)
        try:
            outcome, text = judged(subject, folder)
        except Hang:
            outcome, text = "over 2 s", ""
        if outcome != "over 2 s" or last:
            break
        subject.renew()
    if outcome in ("refused", *FAULTS):
        change = subject.change()
        if change and outcome == "refused":
            outcome, text = "model changed", change
    tally.counts[outcome] += 1
    if outcome in FAULTS:
        tally.faults.append((number, outcome, what, text))
    if outcome != "refused":
        subject.renew()


def judged(subject: Subject, folder: Path) -> tuple[str, str]:
    """The outcome of a reading, and what is wrong with it.

    Raises:
        Hang: it took too long.
    """
    try:
        with at_most(SECONDS):
            found = subject.read(folder)
    except subject.refusals:
        return "refused", ""
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        return "unrelated exception", f"{type(error).__name__}: {error!s:.100} ({place})"
    if found is None:
        return "refused", ""
    if wrong := subject.wrong(found):
        return "wrong tensor", wrong
    return ("accepted and equal" if subject.equal(found) else "accepted otherwise"), ""


def report(tallies: dict[str, Tally]) -> str:
    columns = ("mutations", *OUTCOMES, *FAULTS)
    total = Tally()
    for tally in tallies.values():
        total.counts += tally.counts
    rows = [("", *columns)]
    for kind, tally in [*tallies.items(), ("all", total)]:
        rows.append((kind, *(str(tally.counts[column]) for column in columns)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.rjust(w) for text, w in zip(row, widths, strict=True)) for row in rows]
    for kind, tally in tallies.items():
        lines += [
            f"{kind} {number}: {fault}: {what}: {text}"
            for number, fault, what, text in sorted(tally.faults)
        ]
    return "\n".join(lines)


@dataclass
class Worker:
    """A process that does mutations; one that no signal stops is killed."""

    kind: str
    left: list[int]
    process: Any
    pipe: Any
    began: float

    @classmethod
    def started(cls, kind: str, numbers: list[int]) -> Worker:
        context = multiprocessing.get_context("fork")
        pipe, end = context.Pipe()
        process = context.Process(target=attack, args=(kind, numbers, end.send))
        process.start()
        end.close()
        return cls(kind, numbers, process, pipe, time.monotonic() + SET_UP_SECONDS)

    def received(self, tally: Tally) -> bool:
        """Take what the process sends; False at its end."""
        try:
            message = self.pipe.recv()
        except EOFError:
            self.process.join()
            return False
        if isinstance(message, Tally):
            tally.add(message)
            del self.left[0]
        self.began = time.monotonic()
        return True


def campaign(
    kinds: list[str], count: int, processes: int, seconds: float, only: int | None = None
) -> dict[str, Tally]:
    """`count` mutations over all kinds, an equal share of each."""
    deadline = time.monotonic() + seconds
    share = -(-count // len(kinds))
    tallies = {kind: Tally() for kind in kinds}
    waiting = [
        (kind, list(range(first, share, PARTS)) if only is None else [only])
        for first in range(PARTS if only is None else 1)
        for kind in kinds
    ]
    running: list[Worker] = []
    while running or waiting:
        while waiting and len(running) < processes and time.monotonic() < deadline:
            kind, numbers = waiting.pop(0)
            if numbers:
                running.append(Worker.started(kind, numbers))
        ready = connection.wait([worker.pipe for worker in running], timeout=0.5)
        now = time.monotonic()
        for worker in list(running):
            if worker.pipe in ready:
                if not worker.received(tallies[worker.kind]):
                    running.remove(worker)
                    if worker.left:
                        _record_end(worker, tallies[worker.kind])
                        waiting.append((worker.kind, worker.left[1:]))
            elif now > worker.began + 5 * SECONDS:
                worker.process.kill()
            if now > deadline:
                worker.process.kill()
        if now > deadline:
            break
    return tallies


def _record_end(worker: Worker, tally: Tally) -> None:
    """The process ended within a mutation: it was killed, or crashed."""
    fault = "over 2 s" if worker.process.exitcode == -signal.SIGKILL else "unrelated exception"
    tally.counts["mutations"] += 1
    tally.counts[fault] += 1
    text = f"the process ended with {worker.process.exitcode}"
    tally.faults.append((worker.left[0], fault, mutation_of(worker.kind, worker.left[0]), text))


def mutation_of(kind: str, number: int) -> str:
    """What a mutation does, without reading the result."""
    with tempfile.TemporaryDirectory() as folder:
        subject = SUBJECTS[kind](Path(folder) / "intact")
        restore(Path(folder) / "mutated", subject.intact)
        draw = random.Random(f"{kind} {number}")
        return mutate(Path(folder) / "mutated", sorted(subject.intact), draw, subject.seal)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mutations", nargs="?", type=int, default=10_000)
    parser.add_argument("--kind", choices=SUBJECTS, action="append")
    parser.add_argument("--only", type=int, help="one mutation by its number")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after these")
    chosen = parser.parse_args()
    kinds = chosen.kind or list(SUBJECTS)
    tallies = campaign(kinds, chosen.mutations, chosen.processes, 60 * chosen.minutes, chosen.only)
    print(report(tallies))
    done = sum(tally.counts["mutations"] for tally in tallies.values())
    if chosen.only is None and done < chosen.mutations:
        print(f"{done} of {chosen.mutations} mutations were done in {chosen.minutes} minutes")
        return 1
    return any(tally.faults for tally in tallies.values())


if __name__ == "__main__":
    sys.exit(main())
