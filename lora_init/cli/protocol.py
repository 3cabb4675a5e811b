"""`lora-init compare`: the fair protocol on a model and a table of labeled texts."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import lora_init
from lora_init.cli.output import emit

PACKAGES = ("lora_init_experiments", "experiments")
"""The name of the applications in an installation, and in a clone."""

NAMES = {
    "data.path=": "DATA=",
    "data.text_column=": "--text ",
    "data.label_column=": "--label ",
    "model.path=": "MODEL=",
    "hydra.sweeper.methods=": "--methods ",
    "hydra.sweeper.seeds=": "--seeds ",
    "hydra.sweeper.ranks=": "--rank ",
    "hydra.sweeper.grid=": "--rates ",
    "training.steps=": "--steps ",
    "training.max_length=": "--max-length ",
    "paths.outputs=": "--out ",
    "paths.outputs ": "--out ",
}
"""The settings of the applications, as this command names them."""


def add_compare_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="folder or hub name, or the packaged minilm or smollm2"
    )
    parser.add_argument("data", metavar="DATA", help="table of texts and labels: .csv .tsv .jsonl")
    parser.add_argument(
        "--methods", default="kaiming,pissa,eva", metavar="NAMES",
        help="with commas; see `lora-init list` (default: kaiming,pissa,eva)",
    )  # fmt: skip
    parser.add_argument("--text", "--text-column", default="text", metavar="COLUMN")
    parser.add_argument("--label", "--label-column", default="label", metavar="COLUMN")
    parser.add_argument("--seeds", default="0,1,2", help="with commas (default: 0,1,2)")
    parser.add_argument("-r", "--rank", type=int, default=8, help="of the adapters (default: 8)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
    parser.add_argument(
        "--rates", type=int, default=5,
        help="learning rates that each method begins with (default: 5)",
    )  # fmt: skip
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row")
    parser.add_argument(
        "--out", default="comparison", metavar="FOLDER", help="for runs and report (comparison)"
    )
    parser.add_argument("--jobs", type=int, help="runs at a time (default: 2)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="a setting of every run, such as training.batch_size=32; may be repeated",
    )  # fmt: skip


def compare_methods(arguments: Namespace) -> None:
    """Train each method at its own best learning rate, and print the path of the report's page.

    Raises:
        ValueError: an argument is not supported, or the applications are not installed. No run has
            started then.
        ChildProcessError: a run failed.
    """
    application = _application()
    try:
        asked = application.Comparison(
            model=arguments.model,
            data=arguments.data,
            text=arguments.text,
            label=arguments.label,
            methods=_names(arguments.methods),
            seeds=_seeds(arguments.seeds),
            rank=arguments.rank,
            steps=arguments.steps,
            rates=arguments.rates,
            max_length=arguments.max_length,
            out=arguments.out,
            jobs=arguments.jobs,
            overrides=arguments.set,
        )
        found = application.compare(asked, sys.stderr if arguments.json else sys.stdout)
    except ValueError as error:
        message = str(error)
        for setting, name in NAMES.items():
            message = message.replace(setting, name)
        raise ValueError(message) from error
    emit(arguments, found, f"open {found['page']} in a browser")


def _application() -> Any:
    """The module that compares, which comes with the extra `experiments`.

    It is imported by name: the library does not depend on its applications.
    """
    root = Path(lora_init.__file__).resolve().parents[1]
    found = [name for name in PACKAGES if (root / name / "compare.py").is_file()]
    if not found:
        raise ValueError(f"compare.py is in none of {', '.join(PACKAGES)} in {root}: reinstall")
    if found[0] not in sys.modules and str(root) not in sys.path:
        sys.path.append(str(root))  # a clone
    try:
        return import_module(f"{found[0]}.compare")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"compare needs {error.name}, which is not installed: "
            "pip install 'lora_init[experiments]'"
        ) from error


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(
            f"--methods {text!r} is not supported: must be names with commas between them"
        )
    return names


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--seeds {text!r} is not supported: must be integers with commas between them"
        ) from None
