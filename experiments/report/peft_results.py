"""Results of PEFT's own method comparison, shown next to ours.

The files are those of github.com/huggingface/peft, `method_comparison/<task>/results/*.json`. Each
has `run_info` (name, time, training and adapter configuration), `train_info` (status, metrics) and
`meta_info` (versions). Model, data and budget differ from ours, so that the results are marked as
PEFT's and never averaged or paired with ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cells import mantissa, number
from .runs import Problem, read_json
from .table import Table

SCORE = "test accuracy"
HEADERS = (
    "PEFT’s experiment", "task", "model", "adapter", "init", "rank", "learning rate", "steps",
    "trainable", "test accuracy, %", "PEFT",
)  # fmt: skip


@dataclass(frozen=True)
class PeftRow:
    """The newest result of one of PEFT's experiments.

    Attributes:
        task: the folder's name, such as "MetaMathQA".
        init: `init_lora_weights` of the adapter's configuration; empty if it has none.
        score: test accuracy, of one seed.
    """

    experiment: str
    task: str
    model: str
    adapter: str
    init: str
    rank: int | None
    learning_rate: float | None
    steps: int | None
    trainable: int | None
    score: float
    created: str
    version: str

    def cells(self) -> list[str]:
        """The result as text, in the order of `HEADERS`."""
        rate = "—" if self.learning_rate is None else mantissa(self.learning_rate)
        return [
            self.experiment, self.task, self.model, self.adapter, self.init or "—",
            number(self.rank), rate, number(self.steps), number(self.trainable),
            f"{100 * self.score:.1f}", self.version or "—",
        ]  # fmt: skip


def peft_table(rows: list[PeftRow]) -> Table:
    """The rows as text."""
    return Table("PEFT's own results", HEADERS, [row.cells() for row in rows])


def load_peft_results(path: Path) -> tuple[list[PeftRow], list[Problem]]:
    """Read one file or every `*.json` of a folder, best score first.

    The newest of several results of one experiment and model counts, as on PEFT's own pages.

    Raises:
        FileNotFoundError: the path does not exist, or the folder has no JSON file.
    """
    if not path.exists():
        raise FileNotFoundError(f"--peft-results: no file or folder '{path}'")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(
            f"--peft-results: no *.json in '{path}'; pass PEFT's folder "
            "method_comparison/MetaMathQA/results, or one of its files"
        )
    newest: dict[tuple[str, str], PeftRow] = {}
    problems = []
    for file in files:
        try:
            row = read_row(read_json(file), task_of(file))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            reason = f"not a result of PEFT's comparison: {type(error).__name__}: {error}"
            problems.append(Problem(f"PEFT's {file.name}", reason))
            continue
        known = newest.get((row.experiment, row.model))
        if known is None or known.created < row.created:
            newest[row.experiment, row.model] = row
    return sorted(newest.values(), key=lambda row: -row.score), problems


def task_of(file: Path) -> str:
    """The task's folder: MetaMathQA for `method_comparison/MetaMathQA/results/x.json`."""
    folder = file.resolve().parent
    return folder.parent.name if folder.name == "results" else folder.name


def read_row(content: dict[str, Any], task: str) -> PeftRow:
    run, train = content["run_info"], content["train_info"]
    if train["status"] != "success":
        raise ValueError(f"its status is '{train['status']}'")
    adapter = run.get("peft_config") or {}  # null for full fine-tuning
    settings = run["train_config"]
    init = adapter.get("init_lora_weights", "")
    versions = (content.get("meta_info") or {}).get("package_info") or {}
    return PeftRow(
        experiment=str(run["experiment_name"]),
        task=task,
        model=str(settings["model_id"]),
        adapter=str(adapter.get("peft_type", "full fine-tuning")) + flags(adapter),
        init=init if isinstance(init, str) else json.dumps(init),
        rank=adapter.get("r"),
        learning_rate=(settings.get("optimizer_kwargs") or {}).get("lr"),
        steps=settings.get("max_steps"),
        trainable=train.get("num_trainable_params"),
        score=float(train["metrics"][-1][SCORE]),
        created=str(run.get("created_at", "")),
        version=str(versions.get("peft-version", "")),
    )


def flags(adapter: dict[str, Any]) -> str:
    named = {"use_rslora": "rsLoRA", "use_dora": "DoRA"}
    found = [label for key, label in named.items() if adapter.get(key)]
    return f" ({', '.join(found)})" if found else ""
