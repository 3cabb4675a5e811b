"""One part in a separate process, which has a time limit and cannot crash the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .parts import Part, selected
from .record import Record, brief
from .task import Task, pick_device

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "LORA_INIT_CACHE": "off",  # a cached decomposition would take no time
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "CUDA_MODULE_LOADING": "LAZY",
}
KILL_SECONDS = 3.0
"""A part stops this much before its limit, so that it ends by itself."""


def run_in_process(part: Part, folder: Path, small: bool, seconds: float) -> Record:
    """Run the part in a new process and return its record, however it ended."""
    path, log_path = folder / f"{part.name}.json", folder / f"{part.name}.log"
    path.unlink(missing_ok=True)
    started = time.monotonic()
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "experiments.gpu.process"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
        ends = started + seconds - KILL_SECONDS  # all processes read the same clock
        request = {"part": part.name, "path": str(path), "small": small, "ends": ends}
        killed = False
        try:
            child.communicate(json.dumps(request).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            killed = True
        finally:
            with contextlib.suppress(ProcessLookupError):  # also ends the child's own processes
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    record = Record.read(part.name, path)
    status, message = record.status, record.message
    if killed:
        status, message = "killed", f"it did not end within {seconds:.0f} s"
    elif status == "running":
        lines = log_path.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        status, message = "failed", f"its process ended with status {child.returncode}: {last}"
    record.end(status, message, time.monotonic() - started)
    return record


def run_here(part: Part, record: Record, small: bool, ends: float) -> Record:
    """Run the part in this process and return its record. An exception is recorded."""
    started = time.monotonic()
    status, message = "done", ""
    try:
        part.run(Task(record, pick_device(small), small, ends))
    except Exception as error:
        status, message = "failed", brief(error)
    record.end(status, message, time.monotonic() - started)
    return record


def main() -> None:
    request = json.load(sys.stdin)
    (part,) = selected([request["part"]])
    run_here(part, Record(part.name, Path(request["path"])), request["small"], request["ends"])


if __name__ == "__main__":
    main()
