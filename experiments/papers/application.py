"""One reproduction as a Hydra application: options in, files and a table on the terminal out."""

from __future__ import annotations

import os
import time

# Before transformers is imported, which would print a warning in forked processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
import rich
import torch
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from ..config.location import CONFIGURATIONS
from ..config.resolve import as_settings
from ..console import say
from ..errors import ConfigurationError, RunFailed
from .reproduction import Options, Reproduction
from .result import Result, fingerprint, folder, read_result, write_result
from .text import terminal_claims, terminal_table


def run(reproduction: Reproduction) -> None:
    """Run the command line of one reproduction."""
    register_schema(reproduction)

    def main(composed: DictConfig) -> None:
        try:
            carry_out(reproduction, resolve(composed))
        except (ConfigurationError, RunFailed) as error:
            # Hydra prints this kind of exception as its message; HYDRA_FULL_ERROR=1 shows the rest.
            raise CompactHydraException(str(error)) from error

    path = str(CONFIGURATIONS / "papers" / reproduction.name)
    hydra.main(config_path=path, config_name="fast", version_base="1.3")(main)()


def register_schema(reproduction: Reproduction) -> None:
    """Store the options as "schema", which `conf/papers/<name>/*.yaml` are checked against."""
    ConfigStore.instance().store(name="schema", node=reproduction.options)


def resolve(composed: DictConfig) -> Options:
    """Turn Hydra's composition into the reproduction's own options.

    Raises:
        ConfigurationError: a value is not supported.
    """
    return as_settings(composed, Options)


def carry_out(reproduction: Reproduction, options: Options) -> Result:
    """Measure, write and print; or print the finished result if nothing has changed."""
    output, title = folder(reproduction.name, options), reproduction.title
    finished = None if options.rerun else read_result(output)
    if finished is not None and finished.fingerprint == fingerprint(reproduction.name, options):
        say(f"{title}: finished before, with the same settings and code -> {output}")
        rich.get_console().print(terminal_claims(finished.claims))
        return finished
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    say(f"{title} ({options.form} form)")
    began = time.monotonic()
    findings = reproduction.reproduce(options)
    result = write_result(reproduction, options, findings, time.monotonic() - began)
    for table in result.tables[:1]:
        texts = (table[key] for key in ("title", "headers", "rows", "right"))
        rich.get_console().print(terminal_table(*texts))
    rich.get_console().print(terminal_claims(findings.claims))
    say(f"{title}: {result.seconds:.0f} s -> {output}")
    return result
