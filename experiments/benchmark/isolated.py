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
    **arguments: Any,
) -> Outcome:
    """Call `function(settings, report, **arguments)` in a new process and gather its reports.

    Args:
        function: a module's own function; it tells what it finds by `report(dict)`.
        time_limit: seconds; the process is killed then.
        variables: environment variables for the process.
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
            try:
                child.communicate(json.dumps(request).encode(), timeout=time_limit)
            except subprocess.TimeoutExpired:
                failure = f"no end within {time_limit:g} s"
            finally:
                with contextlib.suppress(ProcessLookupError):  # with what it started itself
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if failure is None and child.returncode != 0:
            told = last_line(errors.read_text(errors="replace"))
            failure = f"process ended with {told or f'exit status {child.returncode}'}"
        lines = reports.read_text().splitlines()
    return Outcome([json.loads(line) for line in lines], failure)


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
