"""`lora-init compare`: the fair protocol on a model and a table of labeled texts."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from lora_init.cli.adapter_arguments import MODEL_HELP
from lora_init.cli.applications import application
from lora_init.cli.output import emit

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
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
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
    compare = application("compare")
    try:
        asked = compare.Comparison(
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
        found = compare.compare(asked, sys.stderr if arguments.json else sys.stdout)
    except ValueError as error:
        message = str(error)
        for setting, name in NAMES.items():
            message = message.replace(setting, name)
        raise ValueError(message) from error
    emit(arguments, found, f"open {found['page']} in a browser")


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
