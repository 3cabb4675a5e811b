"""Hydra's entry point: run the chosen sections, print each table, write the results.

Every setting is listed by `python -m experiments.benchmark --cfg job`.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

# Before transformers and PEFT are imported: bars of their own inside a measurement would be noise.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["LORA_INIT_CACHE"] = "off"  # what was stored by an earlier call would cost nothing

import hydra
import rich
import torch
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from experiments.benchmark.clock import Clock
from experiments.benchmark.report import Ledger
from experiments.benchmark.sections import SECTIONS
from experiments.benchmark.settings import BenchmarkConfig, register_schema, resolve
from experiments.benchmark.tables import terminal_table
from experiments.console import say
from experiments.errors import ConfigurationError, RunFailed

CONFIGURATIONS = Path(__file__).resolve().parents[2] / "conf" / "benchmark"

register_schema()

# PEFT calls a method of transformers that has a new name, and imports bitsandbytes, which reports
# an accelerator package that nobody asked for.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@hydra.main(config_path=str(CONFIGURATIONS), config_name="benchmark", version_base="1.3")
def main(composed: DictConfig) -> None:
    try:
        benchmark(resolve(composed))
    except (ConfigurationError, RunFailed) as error:
        # Hydra prints this kind of exception as its message; HYDRA_FULL_ERROR=1 shows the rest.
        raise CompactHydraException(str(error)) from error


def benchmark(settings: BenchmarkConfig) -> Path:
    """Run the sections in their order and write everything; returns the folder.

    What breaks off leaves the rows and charts of what was measured by then.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    clock, ledger = Clock(settings.seconds), Ledger(settings)
    try:
        for section in settings.sections:
            module = SECTIONS[section]
            say(f"{section}: {module.TITLE}")
            measured = module.run(settings, ledger.hear, clock)
            console, extra = rich.get_console(), {} if hasattr(module, "EXTRA") else None
            console.print(terminal_table(measured, extra, console.width))
    except BaseException:
        if ledger.rows:
            ledger.draw()
            say(f"benchmark: broken off; what was measured before is in {ledger.output}")
        raise
    ledger.finish()
    say(f"benchmark: {ledger.output}")
    return ledger.output


if __name__ == "__main__":
    main()
