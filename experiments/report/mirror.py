"""The report in wandb: its pictures, table and page, in the group of the sweep's runs.

The local files stay the reference. The run is offline unless WANDB_MODE says otherwise, and
`wandb sync` uploads it into the group of the runs.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ConfigurationError
from ..run.tracking import LONGEST_NAME, shortened
from .contents import Report
from .result_table import results

JOB_TYPE = "report"


def log_to_wandb(report: Report, project: str = "lora_init") -> Path:
    """Log pictures, the results table and the page. Return the folder of the wandb run.

    Raises:
        ConfigurationError: the package wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigurationError(
            "--wandb: the package wandb is not installed. Install it by `pip install wandb`, or "
            "omit --wandb."
        ) from error
    run = wandb.init(
        project=project,
        mode=os.environ.get("WANDB_MODE", "offline"),
        group=shortened(report.name, LONGEST_NAME),
        job_type=JOB_TYPE,
        name=shortened(f"report of {report.name}", LONGEST_NAME),
        config={"headline": list(report.headline), "metric": report.metric},
        dir=str(report.page.parent),
        settings=wandb.Settings(silent=True, console="off"),
    )
    failed = True
    try:
        shown = results(report.rows, report.metric, report.name)
        table = wandb.Table(columns=list(shown.headers), data=[list(row) for row in shown.rows])
        pictures = {
            f"charts/{name}": wandb.Image(str(path))
            for name, path in report.figures.items()
            if path.suffix == ".png"
        }
        page = wandb.Html(report.page.read_text(encoding="utf-8"), inject=False)
        run.log({"results": table, "page": page, **pictures})
        failed = False
        return Path(run.dir).parent
    finally:
        run.finish(exit_code=1 if failed else 0)
