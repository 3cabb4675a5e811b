"""A function in a process of its own: fresh memory, a time limit, and a crash that stays there.

The child appends what it measures to a file, line by line, so that a child that never ends has
still told what it knew.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.benchmark.settings import BenchmarkConfig, from_plain, to_plain

ROOT = Path(__file__).resolve().parents[2]
QUIET = {
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "LORA_INIT_CACHE": "off",  # what was stored by an earlier call would cost nothing
}
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """What a child reported, and why it did not come to its end, if it did not."""

    reports: list[dict[str, Any]]
    failure: str | None = None


def run_isolated(
    function: Callable[..., None],
    settings: BenchmarkConfig,
    time_limit: float,
    variables: Mapping[str, str] | None = None,
    hear: Callable[[dict[str, Any]], None] | None = None,
    **arguments: Any,
) -> Outcome:
    """Call `function(settings, report, **arguments)` in a new process and gather its reports.

    Args:
        function: a module's own function; it tells what it finds by `report(dict)`.
        time_limit: seconds; the process is killed then.
        variables: environment variables for the process.
        hear: called with each report within a second of its being made.
        arguments: JSON types.
    """
    request = {
        "module": function.__module__,
        "function": function.__name__,
        "settings": to_plain(settings),
        "arguments": arguments,
    }
    with tempfile.TemporaryDirectory() as folder:
        reports, errors = Path(folder) / "reports.jsonl", Path(folder) / "errors.txt"
        reports.touch()
        with errors.open("wb") as sink:
            child = subprocess.Popen(
                [sys.executable, "-m", "experiments.benchmark.isolated", str(reports)],
                stdin=subprocess.PIPE, stdout=sink, stderr=sink, cwd=ROOT,
                env=os.environ | QUIET | dict(variables or {}),
                start_new_session=True,
            )  # fmt: skip
            failure = None
            heard = Hearing(reports, hear)
            try:
                child.stdin.write(json.dumps(request).encode())
                child.stdin.close()
                ends = time.monotonic() + time_limit
                while child.poll() is None and failure is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(min(POLL_SECONDS, max(ends - time.monotonic(), 0.01)))
                    heard.listen()
                    if child.poll() is None and time.monotonic() >= ends:
                        failure = f"no end within {time_limit:g} s"
            finally:
                with contextlib.suppress(ProcessLookupError):  # with what it started itself
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if failure is None and child.returncode != 0:
            told = last_line(errors.read_text(errors="replace"))
            failure = f"process ended with {told or f'exit status {child.returncode}'}"
        heard.listen()
    return Outcome(heard.reports, failure)


class Hearing:
    """Reads what a growing file of reports has got since the last time."""

    def __init__(self, path: Path, hear: Callable[[dict[str, Any]], None] | None) -> None:
        self.path, self.hear, self.read = path, hear, 0
        self.reports: list[dict[str, Any]] = []

    def listen(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self.read)
            complete = file.read().rpartition(b"\n")[0]  # not a line that is being written
        self.read += len(complete) + bool(complete)
        for line in complete.splitlines():
            self.reports.append(json.loads(line))
            if self.hear is not None:
                self.hear(self.reports[-1])


def last_line(text: str) -> str:
    """Of a traceback: the exception and its message."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def brief(error: BaseException, length: int = 160) -> str:
    """An exception as one line for a table."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= length else text[: length - 1] + "…"


def main() -> None:
    import torch

    request = json.load(sys.stdin)
    settings = from_plain(request["settings"])
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    function = getattr(importlib.import_module(request["module"]), request["function"])
    with Path(sys.argv[1]).open("a") as file:

        def report(measured: dict[str, Any]) -> None:
            file.write(json.dumps(measured) + "\n")
            file.flush()

        function(settings, report, **request["arguments"])


if __name__ == "__main__":
    main()
