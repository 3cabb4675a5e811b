"""Run all reproductions, each in its own process, then write the page.

    python -m experiments.papers                the fast form of all
    python -m experiments.papers --config-name family    the family tree of starts
    python -m experiments.papers --cfg job      lists every option

Several run at a time, each with its share of the cores: most matrices are too small for many
threads. The same command after an interruption measures only what is missing or has changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import rich
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import DictConfig
from rich.table import Table

from ..config.location import CONFIGURATIONS, qualified
from ..config.resolve import as_settings
from ..console import say
from ..errors import ConfigurationError
from .catalogue import NAMES, check_names
from .page import TITLE, verdict_counts, write_page
from .reproduction import FORMS, require
from .result import Result, read_result
from .text import terminal_table


@dataclass
class AllPapers:
    """What to measure and where to write.

    Attributes:
        papers: the reproductions, in this order.
        form: smoke, fast or full, the same for all.
        output: results are written to `<output>/<form>/<name>`.
        page: the folder of the page and its pictures; null writes no page.
        title: the heading of the page.
        overrides: options for all of them, such as `[device=cpu, seed=1]`.
        at_once: how many run at a time; null: one for each core, at most four.
        measure: false writes the page from existing results.
        rerun: measure again even if a result exists.
    """

    papers: list[str] = field(default_factory=lambda: list(NAMES))
    form: str = "fast"
    output: str = "outputs/papers"
    page: str | None = "outputs/papers/page"
    title: str = TITLE
    overrides: list[str] = field(default_factory=list)
    at_once: int | None = None
    measure: bool = True
    rerun: bool = False

    def __post_init__(self) -> None:
        check_names(self.papers)
        require(self, "form", self.form in FORMS, f"one of {', '.join(FORMS)}")
        at_once = self.at_once
        require(self, "at_once", at_once is None or at_once >= 1, "an integer >= 1, or null")


def register_schema() -> None:
    """Store the options as the schema of `conf/papers/all.yaml`."""
    ConfigStore.instance().store(name="papers_schema", node=AllPapers)


register_schema()


@hydra.main(config_path=str(CONFIGURATIONS / "papers"), config_name="all", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Measure, print the summary, and write the page."""
    try:
        options = as_settings(composed, AllPapers)
        failed = measure_all(options) if options.measure else []
        results = collect_results(options, without=failed)
    except ConfigurationError as error:
        raise CompactHydraException(str(error)) from error
    if results:
        rich.get_console().print(summary(results))
        if options.page is not None:
            say(f"papers: {write_page(results, Path(options.page), options.title)}")
    if failed:
        raise CompactHydraException(f"not finished: {', '.join(failed)}; the page has the others")


def summary(results: Sequence[Result]) -> Table:
    """The verdicts of every reproduction, and its seconds."""
    (_, *headers), rows = verdict_counts(results)
    shown = [
        [result.name, *counts, f"{result.seconds:.0f}"]
        for result, (_, *counts) in zip(results, rows, strict=True)
    ]
    right = [False] + [True] * (len(headers) + 1)
    return terminal_table("", ["reproduction", *headers, "s"], shown, right)


def measure_all(options: AllPapers) -> list[str]:
    """Run every reproduction in its own process; return the names of those that failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = options.at_once or min(4, cores or 1)
    threads = max(1, (cores or 1) // at_once)
    began = time.monotonic()

    def measured(name: str) -> bool:
        succeeded = measure(options, name, threads)
        seconds = time.monotonic() - began
        say(f"{name}: {'done' if succeeded else 'FAILED'} after {seconds:.0f} s in all")
        return succeeded

    say(f"{len(options.papers)} reproductions, {at_once} at a time, {threads} threads each")
    with ThreadPoolExecutor(at_once) as pool:
        outcomes = list(pool.map(measured, options.papers))
    return [name for name, good in zip(options.papers, outcomes, strict=True) if not good]


def measure(options: AllPapers, name: str, threads: int) -> bool:
    """Run one reproduction, print its output under its name, and return whether it succeeded."""
    command = [sys.executable, "-m", qualified(f"papers.{name}"), "--config-name", options.form]
    command += [f"output={options.output}", f"threads={threads}", *options.overrides]
    if options.rerun:
        command.append("rerun=true")
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    with process:
        for line in process.stdout:
            say(f"{name}: {line.rstrip()}")
    return process.returncode == 0


def collect_results(options: AllPapers, without: Sequence[str] = ()) -> list[Result]:
    """Read the existing results, except those of reproductions that just failed."""
    names = [name for name in options.papers if name not in without]
    folders = [Path(options.output) / options.form / name for name in names]
    return [result for path in folders if (result := read_result(path)) is not None]


if __name__ == "__main__":
    main()
