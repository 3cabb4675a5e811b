"""One part in a separate process: fresh memory, a time limit, and a crash that stays there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from experiments.gpu.parts import Part, selected
from experiments.gpu.record import Record, brief
from experiments.gpu.task import Task, pick_device

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "LORA_INIT_CACHE": "off",  # a stored decomposition would cost nothing
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "CUDA_MODULE_LOADING": "LAZY",
}
KILL_SECONDS = 3.0
"""What is left of the limit when a part should have ended, so that it can say so itself."""


def run_in_process(part: Part, folder: Path, small: bool, seconds: float) -> Record:
    """Run the part and return its record, however it ended."""
    path = folder / f"{part.name}.json"
    path.unlink(missing_ok=True)
    started = time.monotonic()
    with (folder / f"{part.name}.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "experiments.gpu.process"],
            stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT,
            env=os.environ | ENVIRONMENT, start_new_session=True,
        )  # fmt: skip
        ends = started + seconds - KILL_SECONDS  # all processes read the same clock
        request = {"part": part.name, "path": str(path), "small": small, "ends": ends}
        killed = False
        try:
            child.communicate(json.dumps(request).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            killed = True
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what the part started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    record = Record.read(part.name, path)
    taken = time.monotonic() - started
    if killed:
        record.end("killed", f"it did not end within {seconds:.0f} s", taken)
    elif record.status == "running":
        told = last_line(folder / f"{part.name}.log")
        record.end("failed", f"its process ended with status {child.returncode}: {told}", taken)
    else:
        record.end(record.status, record.message, taken)
    return record


def run_here(part: Part, record: Record, small: bool, ends: float) -> Record:
    """Run the part in this process and return its record; an exception is recorded."""
    started = time.monotonic()
    status, message = "done", ""
    try:
        part.run(Task(record, pick_device(small), small, ends))
    except Exception as error:
        status, message = "failed", brief(error)
    record.end(status, message, time.monotonic() - started)
    return record


def last_line(log: Path) -> str:
    """Of a traceback: the exception and its message."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def main() -> None:
    request = json.load(sys.stdin)
    (part,) = selected([request["part"]])
    record = Record(part.name, Path(request["path"]))
    run_here(part, record, request["small"], request["ends"])


if __name__ == "__main__":
    main()
