"""The fair protocol on a user's model and table: the application behind `lora-init compare`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import Thread
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lora_init import LoraConfig, get_peft_model
from lora_init.registry import get_initializer

from .config.location import CONFIGURATIONS, FOLDER, PACKAGE
from .config.protocol import ProtocolConfig
from .config.resolve import run_of
from .config.run_config import RunConfig
from .config.store import missing_inputs, register_schemas
from .data import Splits, load_data
from .errors import ConfigurationError
from .models import PACKAGED, load_model
from .report.__main__ import make, show
from .run.outputs import open_outputs

CONFIGURATION = "sweep_table"
LEAST_ROWS = 5
"""In each split. Below this, one row is more than a fifth of the score."""
SPARE_BYTES = 64 * 2**20
"""Room for the report, and for the checkpoint of a long run."""

register_schemas()


@dataclass(frozen=True)
class Comparison:
    """What to compare, on what, and where to write.

    Attributes:
        model: a short name of `PACKAGED`, a folder, or a name on the hub.
        data: a .csv, .tsv or .jsonl file with a column of texts and a column of labels.
        jobs: runs at a time; None means two on a CPU, and one on an accelerator.
        rates: how many learning rates each method begins with.
        overrides: further settings of every run, as for `train`.
    """

    model: str
    data: str
    text: str
    label: str
    methods: Sequence[str]
    seeds: Sequence[int]
    rank: int
    steps: int
    rates: int
    max_length: int
    out: str
    jobs: int | None = None
    overrides: Sequence[str] = ()

    def settings(self) -> list[str]:
        """The settings of every run and of the protocol, as overrides for Hydra."""
        if self.model in PACKAGED:
            model = [f"model={self.model}"]
        else:
            folder = Path(self.model).expanduser()
            path = str(folder.resolve()) if folder.exists() else self.model
            name = Path(self.model).name or "local"
            model = ["model=local", f"model.path={quoted(path)}", f"model.name={quoted(name)}"]
        baseline = "kaiming" if "kaiming" in self.methods else self.methods[0]
        return [
            *model,
            f"data.path={quoted(str(Path(self.data).expanduser().resolve()))}",
            f"data.name={quoted(Path(self.data).stem)}",
            f"data.text_column={quoted(self.text)}",
            f"data.label_column={quoted(self.label)}",
            f"training.steps={self.steps}",
            f"training.max_length={self.max_length}",
            f"paths.outputs={quoted(str(Path(self.out).resolve()))}",
            f"hydra.sweeper.methods=[{','.join(map(quoted, self.methods))}]",
            f"hydra.sweeper.seeds=[{','.join(map(str, self.seeds))}]",
            f"hydra.sweeper.ranks=[{self.rank}]",
            f"hydra.sweeper.grid={self.rates}",
            f"hydra.sweeper.baseline={quoted(baseline)}",
            *([] if self.jobs is None else [f"hydra.launcher.n_jobs={self.jobs}"]),
            *self.overrides,
        ]


def compare(asked: Comparison, shown: Any) -> dict[str, Any]:
    """Check everything, run the protocol, and write the report.

    Args:
        asked: the comparison.
        shown: the stream for progress and tables.

    Returns:
        The page, the sweep's folder, and by method the score, its interval and learning rate.

    Raises:
        ConfigurationError: a setting cannot work. No run has started then.
        ChildProcessError: a run failed. The same command continues with what is missing.
    """
    console = Console(file=shown)
    with console.status("[bold]compare[/bold] checking the table, the model and the disk"):
        run, protocol = composed(asked.settings())
        check(run, protocol)
    command = [sys.executable, "-m", f"{PACKAGE}.train", "--config-name", CONFIGURATION]
    environment = dict(os.environ)
    if FOLDER.name == PACKAGE and not CONFIGURATIONS.is_relative_to(FOLDER):  # a clone
        paths = (str(FOLDER.parent), os.environ.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with descriptor(shown) as stream:
        done = subprocess.run([*command, *asked.settings()], env=environment, stdout=stream)
    if done.returncode != 0:
        raise ChildProcessError(
            f"the comparison in {asked.out!r} is not complete; the reasons are above. Give the "
            "same command again to continue it."
        )
    outputs = Path(run.paths.outputs)
    report = make([outputs / "sweeps" / run.sweep], outputs / "report")
    show(report, console)
    rows = [
        {
            "method": row.arm,
            "score": row.score.estimate,
            "interval": [row.score.low, row.score.high],
            "learning_rate": row.choice.learning_rate,
        }
        for row in report.rows
    ]
    return {
        "page": str(report.page),
        "sweep": str(outputs / "sweeps" / run.sweep),
        "metric": report.metric,
        "methods": rows,
        "summary": list(report.headline),
    }


@contextmanager
def descriptor(shown: Any) -> Iterator[Any]:
    """A stream that a process can write to: `shown`, or a pipe into it, as in a notebook."""
    try:
        shown.fileno()
    except (AttributeError, OSError):
        reader, writer = os.pipe()

        def copy() -> None:
            with open(reader, errors="replace") as lines:
                for line in lines:
                    shown.write(line)

        copying = Thread(target=copy)
        copying.start()
        try:
            yield writer
        finally:
            os.close(writer)
            copying.join()
    else:
        yield shown


def composed(settings: Sequence[str]) -> tuple[RunConfig, ProtocolConfig]:
    """The configuration of the first run, and the one of the protocol.

    Raises:
        ConfigurationError: a setting does not exist or is not supported.
    """
    try:
        with initialize_config_dir(str(CONFIGURATIONS), version_base="1.3"):
            whole = compose(CONFIGURATION, overrides=list(settings), return_hydra_config=True)
    except HydraException as error:
        raise ConfigurationError(str(error).splitlines()[0]) from error
    protocol = protocol_of(whole)
    protocol.check()
    rank = [f"lora.r={protocol.ranks[0]}", f"init={protocol.methods[0]}"]
    with initialize_config_dir(str(CONFIGURATIONS), version_base="1.3"):
        whole = compose(CONFIGURATION, overrides=[*settings, *rank], return_hydra_config=True)
    return run_of(whole), protocol


def protocol_of(whole: DictConfig) -> ProtocolConfig:
    values = OmegaConf.to_container(whole.hydra.sweeper, resolve=True)
    assert isinstance(values, dict)
    known = {field.name for field in fields(ProtocolConfig)}
    return ProtocolConfig(**{str(key): value for key, value in values.items() if key in known})


def check(run: RunConfig, protocol: ProtocolConfig) -> None:
    """Refuse what would fail once runs have started.

    Raises:
        ConfigurationError: it names the setting.
    """
    for method in protocol.methods:
        missing = missing_inputs(get_initializer(method))
        if missing:
            raise ConfigurationError(
                f"--methods {method} is not supported: it reads {', '.join(missing)}, which this "
                "command does not have. Leave it out."
            )
    data = load_data(run.data)
    check_rows(run, data)
    model = load_model(
        run.model, task_type=data.task_type, labels=data.labels, head_seed=run.seeds.head
    ).model
    largest = 0
    for method in protocol.methods:
        config = LoraConfig(**asdict(run.lora), task_type=data.task_type, init_lora_weights=method)
        try:
            plan = get_peft_model(model, config, dry_run=True)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigurationError(f"--methods {method}: {error}") from error
        ranks = 2 if plan.initializer.base == "subtract" else 1
        largest = max(largest, ranks * plan.factor_bytes)
    outputs = Path(run.paths.outputs)
    open_outputs(outputs)
    rates = protocol.grid + protocol.max_extensions + protocol.equal_update
    runs = len(protocol.methods) * len(protocol.seeds) * rates
    needed, free = runs * largest + SPARE_BYTES, shutil.disk_usage(outputs).free
    if free < needed:
        raise ConfigurationError(
            f"--out {run.paths.outputs!r} has {free / 2**20:.0f} MiB left: must have "
            f"{needed / 2**20:.0f} MiB, for the adapters of up to {runs} runs. Make room, or pass "
            "another folder, fewer methods, seeds or rates."
        )


def check_rows(run: RunConfig, data: Splits) -> None:
    """Refuse a table that cannot decide a comparison."""
    sizes = {name: len(getattr(data, name)) for name in ("train", "validation", "test")}
    rows = sum(sizes.values())
    for split, size in sizes.items():
        if size < LEAST_ROWS:
            raise ConfigurationError(
                f"DATA={run.data.path!r} has too few rows: of {rows}, {size} are for the {split}. "
                f"Each split must have at least {LEAST_ROWS}, so give about {6 * LEAST_ROWS} rows "
                "or more."
            )


def quoted(value: str) -> str:
    """A string for Hydra, which may contain any character."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
