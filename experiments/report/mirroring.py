"""The report in wandb: its pictures, its table and its page, in the group of the sweep's runs.

The files are the truth; wandb gets a copy. Offline unless WANDB_MODE says otherwise: `wandb sync`
uploads it later, and the report then stands in the group beside the runs that it was made of.
"""

from __future__ import annotations

import os
from pathlib import Path

from experiments.errors import ConfigurationError
from experiments.run.tracking import LONGEST_NAME, shortened

from .tables import columns
from .writing import Report

JOB_TYPE = "report"


def log_to_wandb(report: Report, project: str = "lora_init", group: str | None = None) -> Path:
    """Log pictures, the table of results and the page; returns the folder of the wandb run.

    Args:
        report: what `write_report` gave.
        project: wandb's.
        group: the runs' group; the sweep's name unless given.

    Raises:
        ConfigurationError: the package wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigurationError(
            "--wandb: the package wandb is not installed; `pip install wandb`, or leave it out"
        ) from error
    run = wandb.init(
        project=project,
        mode=os.environ.get("WANDB_MODE", "offline"),
        group=shortened(group or report.name, LONGEST_NAME),
        job_type=JOB_TYPE,
        name=shortened(f"report of {report.name}", LONGEST_NAME),
        config={"heading": report.heading, "metric": report.metric},
        dir=str(report.page.parent),
        settings=wandb.Settings(silent=True, console="off"),
    )
    failed = True
    try:
        shown = columns(report.metric, report.rows)
        table = wandb.Table(
            columns=[column.header for column in shown],
            data=[[column.show(row) for column in shown] for row in report.rows],
        )
        pictures = {
            f"charts/{name}": wandb.Image(str(path))
            for name, path in report.figures.items()
            if path.suffix == ".png"
        }
        page = wandb.Html(report.figures["page"].read_text(encoding="utf-8"), inject=False)
        run.log({"results": table, "page": page, **pictures})
        failed = False
        return Path(run.dir).parent
    finally:
        run.finish(exit_code=1 if failed else 0)
