"""Hydra's entry point: measure every case within the time limit, and write the results.

`python -m experiments.benchmark --cfg job` lists every setting.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import deque
from pathlib import Path

# Before transformers and PEFT are imported: their progress bars would disturb the measurements.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
import rich
import torch
from hydra.errors import CompactHydraException
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..config.location import CONFIGURATIONS
from ..console import say
from ..errors import ConfigurationError, RunFailed
from . import calibration, experts, initialization, memory, sharded, steps
from .ledger import Ledger
from .page import amount, error, ratio
from .row import Case, Row
from .schema import BenchmarkConfig, register_schema, resolve

CASES = {
    "initialization": initialization.cases,
    "calibration": calibration.cases,
    "memory": memory.cases,
    "steps": steps.cases,
    "experts": experts.cases,
    "sharded": sharded.cases,
}

register_schema()

# PEFT calls a method of transformers under its old name. It also imports bitsandbytes, which
# reports that no accelerator is installed.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
warnings.filterwarnings("ignore", message="Full backward hook is firing")  # PEFT's LoRA-GA
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@hydra.main(
    config_path=str(CONFIGURATIONS / "benchmark"), config_name="benchmark", version_base="1.3"
)
def main(composed: DictConfig) -> None:
    try:
        benchmark(resolve(composed))
    except (ConfigurationError, RunFailed) as error:
        # Hydra prints this kind of exception as its message; HYDRA_FULL_ERROR=1 shows the rest.
        raise CompactHydraException(str(error)) from error


def benchmark(settings: BenchmarkConfig) -> Path:
    """Measure all cases and return the folder of results.

    An interrupted run keeps the rows and the picture of what it measured.
    """
    start = time.monotonic()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    waiting = deque(case for name in settings.sections for case in CASES[name](settings))
    ledger = Ledger(settings)
    finished = False
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    try:
        with Progress(*columns, console=rich.get_console(), transient=True) as progress:
            bar = progress.add_task("", total=len(waiting))
            while waiting:
                case = waiting.popleft()  # a model is freed with its last case
                progress.update(bar, description=f"{case.section}: {case.model}, {case.name}")
                over = settings.seconds is not None and time.monotonic() - start > settings.seconds
                for row in [unmeasured(case, settings)] if over else case.measure():
                    ledger.add(row)
                    say(line(row))
                progress.advance(bar)
        finished = True
    finally:
        if ledger.rows:
            ledger.close(finished)
            ending = "" if finished else "the run ended early; what it measured is in "
            say(f"benchmark: {ending}{ledger.folder}")
    return ledger.folder


def unmeasured(case: Case, settings: BenchmarkConfig) -> Row:
    note = f"not measured: seconds={settings.seconds:g} were over"
    return Row(case.section, case.model, case.name, case.rank, note=note)


def line(row: Row) -> str:
    """Return a row as one line for the terminal."""
    rank = "" if row.rank is None else f" r={row.rank}"
    parts = [f"{row.section:14s} {row.model}{rank} {row.case}: {amount(row.ours, row.unit)}"]
    if row.ratio is not None:
        text = f"{row.peer} / lora_init"
        if row.section == "calibration":
            text = f"multiple of {row.peer}"
        parts.append(f"{text} {ratio(row)}")
    if row.error is not None:
        parts.append(f"error {error(row.error)} ({row.kind})")
    return "; ".join([*parts, *([row.note] if row.note else [])])


if __name__ == "__main__":
    main()
