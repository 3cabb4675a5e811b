"""One reproduction as a Hydra application: settings in, table on the terminal, files out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

# Before transformers is imported: bars of its own between ours would be noise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
import rich
import torch
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from experiments.console import say
from experiments.errors import ConfigurationError, RunFailed
from experiments.papers.reproduction import Paper, PaperSettings
from experiments.papers.result import Result, fingerprint, folder, read_result, write_result
from experiments.papers.text import terminal_claims, terminal_table
from experiments.resolving import as_settings

CONFIGURATIONS = Path(__file__).resolve().parents[2] / "conf" / "papers"
SCHEMA = "schema"


def run(paper: Paper) -> None:
    """The application of one reproduction: `if __name__ == "__main__": run(PAPER)`."""
    application(paper)()


def application(paper: Paper) -> Callable[[], None]:
    register_schema(paper)

    def main(composed: DictConfig) -> None:
        try:
            carry_out(paper, resolve(composed))
        except (ConfigurationError, RunFailed) as error:
            # Hydra prints this kind of exception as its message; HYDRA_FULL_ERROR=1 shows the rest.
            raise CompactHydraException(str(error)) from error

    decorate = hydra.main(
        config_path=str(CONFIGURATIONS / paper.name), config_name="fast", version_base="1.3"
    )
    return decorate(main)


def register_schema(paper: Paper) -> None:
    """What `conf/papers/<name>/*.yaml` is checked against, under the name "schema"."""
    ConfigStore.instance().store(name=SCHEMA, node=paper.settings)


def resolve(composed: DictConfig) -> PaperSettings:
    """Hydra's composition as the reproduction's own dataclass.

    Raises:
        ConfigurationError: a value that its dataclass refuses.
    """
    return as_settings(composed, PaperSettings)


def carry_out(paper: Paper, settings: PaperSettings) -> Result:
    """Measure, write and show; or show what is there, where nothing has changed since."""
    output = folder(paper.name, settings)
    there = None if settings.rerun else read_result(output)
    if there is not None and there.fingerprint == fingerprint(paper.name, settings):
        say(f"{paper.title}: finished before, with the same settings and code -> {output}")
        rich.get_console().print(terminal_claims(there.claims))
        return there
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    say(f"{paper.title} ({settings.form} form)")
    began = time.monotonic()
    findings = paper.reproduce(settings)
    result = write_result(paper, settings, findings, time.monotonic() - began)
    console = rich.get_console()
    for table in findings.tables[:1]:
        console.print(terminal_table(table))
    console.print(terminal_claims(findings.claims))
    say(f"{paper.title}: {result.seconds:.0f} s -> {output}")
    return result
