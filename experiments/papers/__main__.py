"""All reproductions, one process each, then the page: `python -m experiments.papers`.

Every setting is listed by `python -m experiments.papers --cfg job`. What is finished and has not
changed since is not measured again, so the same command after an interruption does what is missing.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import rich
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from experiments.console import say
from experiments.errors import ConfigurationError
from experiments.papers.catalogue import NAMES, check_names
from experiments.papers.page import write_page
from experiments.papers.paper import FORMS
from experiments.papers.results import Result, read_result
from experiments.papers.summary import summary_table

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
        measure: false writes the page from the results that are there.
        rerun: measure again what is there already.
    """

    papers: list[str] = field(default_factory=lambda: list(NAMES))
    form: str = "fast"
    output: str = "outputs/papers"
    page: str | None = "outputs/papers/page"
    overrides: list[str] = field(default_factory=list)
    measure: bool = True
    rerun: bool = False


ConfigStore.instance().store(name="papers_schema", node=AllPapers)


@hydra.main(config_path=str(CONFIGURATIONS), config_name="all", version_base="1.3")
def main(composed: DictConfig) -> None:
    settings = OmegaConf.to_object(composed)
    assert isinstance(settings, AllPapers)
    try:
        check_names(settings.papers)
        if settings.form not in FORMS:
            raise ConfigurationError(f"form={settings.form!r}; allowed are {', '.join(FORMS)}")
        failed = measure_all(settings) if settings.measure else []
        results = gather(settings)
    except ConfigurationError as error:
        raise CompactHydraException(str(error)) from error
    if results:
        rich.get_console().print(summary_table(results))
        if settings.page is not None:
            say(f"papers: {write_page(results, Path(settings.page))}")
    if failed:
        raise CompactHydraException(f"not finished: {', '.join(failed)}; the rest is on the page")


def measure_all(settings: AllPapers) -> list[str]:
    """Every reproduction in a process of its own; returns the names of those that failed."""
    failed = []
    began = time.monotonic()
    for number, name in enumerate(settings.papers, start=1):
        say(f"[{number}/{len(settings.papers)}] {name}, {time.monotonic() - began:.0f} s so far")
        command = [
            sys.executable, "-m", f"experiments.papers.{name}", "--config-name", settings.form,
            f"output={settings.output}", *settings.overrides,
        ]  # fmt: skip
        if settings.rerun:
            command.append("rerun=true")
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
    return failed


def gather(settings: AllPapers) -> list[Result]:
    folders = [Path(settings.output) / settings.form / name for name in settings.papers]
    return [result for path in folders if (result := read_result(path)) is not None]


if __name__ == "__main__":
    main()
