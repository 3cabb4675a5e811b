"""All reproductions, a process each, then the page: `python -m experiments.papers`.

Several run at a time, each with its share of the cores: most of their work is in matrices too small
for many threads.

Every setting is listed by `python -m experiments.papers --cfg job`. What is finished and has not
changed since is not measured again, so the same command after an interruption does what is missing.
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

from experiments.console import say
from experiments.errors import ConfigurationError
from experiments.papers.catalogue import NAMES, check_names
from experiments.papers.page import write_page
from experiments.papers.reproduction import FORMS
from experiments.papers.result import Result, read_result
from experiments.papers.summary import summary_table
from experiments.resolving import as_settings

CONFIGURATIONS = Path(__file__).resolve().parents[2] / "conf" / "papers"


@dataclass
class AllPapers:
    """What to measure and where to write.

    Attributes:
        papers: the reproductions, in this order.
        form: smoke, fast or full, of all of them.
        output: results go to `<output>/<form>/<name>`.
        page: the folder of the page, with its pictures; null writes none.
        overrides: settings for all of them, such as `[device=cpu, seed=1]`.
        at_once: so many reproductions at a time; null: one for each core, four at most.
        measure: false writes the page from the results that are there.
        rerun: measure again what is there already.
    """

    papers: list[str] = field(default_factory=lambda: list(NAMES))
    form: str = "fast"
    output: str = "outputs/papers"
    page: str | None = "outputs/papers/page"
    overrides: list[str] = field(default_factory=list)
    at_once: int | None = None
    measure: bool = True
    rerun: bool = False

    def __post_init__(self) -> None:
        check_names(self.papers)
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r}; allowed are {', '.join(FORMS)}")
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once={self.at_once}; allowed are integers >= 1, and null")


def register_schema() -> None:
    ConfigStore.instance().store(name="papers_schema", node=AllPapers)


register_schema()


@hydra.main(config_path=str(CONFIGURATIONS), config_name="all", version_base="1.3")
def main(composed: DictConfig) -> None:
    try:
        settings = as_settings(composed, AllPapers)
        failed = measure_all(settings) if settings.measure else []
        results = gather(settings, without=failed)
    except ConfigurationError as error:
        raise CompactHydraException(str(error)) from error
    if results:
        rich.get_console().print(summary_table(results))
        if settings.page is not None:
            say(f"papers: {write_page(results, Path(settings.page))}")
    if failed:
        raise CompactHydraException(f"not finished: {', '.join(failed)}; the page has the others")


def measure_all(settings: AllPapers) -> list[str]:
    """Every reproduction in a process of its own; returns the names of those that failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = settings.at_once or min(4, cores or 1)
    threads = max(1, (cores or 1) // at_once)
    began = time.monotonic()

    def measured(name: str) -> bool:
        good = measure(settings, name, threads)
        state = "done" if good else "FAILED"
        say(f"{name}: {state}, {time.monotonic() - began:.0f} s since the beginning")
        return good

    say(f"{len(settings.papers)} reproductions, {at_once} at a time, {threads} threads each")
    with ThreadPoolExecutor(at_once) as pool:
        outcomes = list(pool.map(measured, settings.papers))
    return [name for name, good in zip(settings.papers, outcomes, strict=True) if not good]


def measure(settings: AllPapers, name: str, threads: int) -> bool:
    """One of them; what it prints is passed on line by line, under its name."""
    command = [
        sys.executable, "-m", f"experiments.papers.{name}", "--config-name", settings.form,
        f"output={settings.output}", f"threads={threads}", *settings.overrides,
    ]  # fmt: skip
    if settings.rerun:
        command.append("rerun=true")
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    with process:
        for line in process.stdout:
            say(f"{name}: {line.rstrip()}")
    return process.returncode == 0


def gather(settings: AllPapers, without: Sequence[str] = ()) -> list[Result]:
    """The results that are there, but for those that an earlier form of the code left behind."""
    names = [name for name in settings.papers if name not in without]
    folders = [Path(settings.output) / settings.form / name for name in names]
    return [result for path in folders if (result := read_result(path)) is not None]


if __name__ == "__main__":
    main()
