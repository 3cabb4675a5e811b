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

from experiments.benchmark.report import folder, write_report
from experiments.benchmark.rows import Row
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
    """Run the sections in their order and write everything; returns the folder."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    rows: list[Row] = []
    for section in settings.sections:
        module = SECTIONS[section]
        say(f"{section}: {module.TITLE}")
        measured = module.run(settings)
        console, extra = rich.get_console(), {} if hasattr(module, "EXTRA") else None
        console.print(terminal_table(measured, extra, console.width))
        rows += measured
    output = folder(settings)
    write_report(settings, rows, output)
    say(f"benchmark: {output}")
    return output


if __name__ == "__main__":
    main()
