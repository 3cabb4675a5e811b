"""The parser of `lora-init`, and its exit codes.

0 done, 1 a mistake in the input, 2 a command line that argparse cannot parse, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import nullcontext

from safetensors import SafetensorError

from lora_init import __version__
from lora_init.adapters.diffusers_format import COMPONENTS
from lora_init.cli.adapter_arguments import add_adapter_arguments
from lora_init.cli.catalog import list_methods, show_method
from lora_init.cli.conversion import convert_adapter
from lora_init.cli.creation import add_make_arguments, make_adapter
from lora_init.cli.inspection import inspect_adapter
from lora_init.cli.output import remark, results_only, short_warnings
from lora_init.cli.preview import plan_adapter
from lora_init.cli.protocol import add_compare_arguments, compare_methods

EXAMPLES = """examples:
  lora-init list 'pissa*'
  lora-init show eva
  lora-init plan path/to/model --method pissa -r 16
  lora-init make path/to/model adapter --method eva --data train.jsonl
  lora-init inspect adapter --against path/to/model
  lora-init convert adapter smaller --rank 8 --portable
  lora-init compare minilm reviews.csv --methods kaiming,pissa --text review --label verdict
"""


MISTAKES = (
    ValueError, TypeError, NotImplementedError, OSError, ImportError, SafetensorError,
)  # fmt: skip
"""Errors whose message a user is meant to read. Others are defects, and print a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = parse(argv)
    try:
        with short_warnings(), results_only() if arguments.json else nullcontext():
            arguments.run(arguments)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        remark("interrupted")
        return 130
    except MISTAKES as error:
        remark(f"error: {error}")
        return 1
    return 0


def parse(argv: Sequence[str] | None) -> Namespace:
    """The arguments of a command line; exits with 2 if it is not one of `lora-init`."""
    parser = ArgumentParser(
        prog="lora-init",
        description="Initialize low-rank adapters (LoRA), and inspect and convert their files.",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lora-init {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str) -> ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.add_argument("--json", action="store_true", help="print JSON")
        found.set_defaults(run=run)
        return found

    listing = command("list", list_methods, "list the methods")
    listing.add_argument("pattern", nargs="?", default="*", metavar="PATTERN")
    showing = command("show", show_method, "show a method: what it reads, its options, its paper")
    showing.add_argument("method", metavar="METHOD")
    planning = command("plan", plan_adapter, "show what a start would do; loads no weights")
    add_adapter_arguments(planning)
    planning.add_argument("--no-time", action="store_true", help="do not estimate the time")
    making = command("make", make_adapter, "initialize an adapter and write its folder")
    add_adapter_arguments(making)
    add_make_arguments(making)
    inspecting = command("inspect", inspect_adapter, "show the layers of an adapter's folder")
    inspecting.add_argument("adapter", metavar="ADAPTER")
    inspecting.add_argument("--against", metavar="MODEL", help="compare norms with this base")
    converting = command("convert", convert_adapter, "write an adapter in another form")
    converting.add_argument("adapter", metavar="ADAPTER")
    converting.add_argument("out", metavar="OUT")
    converting.add_argument("--portable", action="store_true", help="for vLLM and llama.cpp")
    converting.add_argument("--rank", type=int, metavar="R", help="truncate to this rank")
    converting.add_argument("--format", choices=("peft", "diffusers"), default="peft")
    converting.add_argument(
        "--component", choices=COMPONENTS,
        help="of a diffusers pipeline (default: transformer)",
    )  # fmt: skip
    comparing = command(
        "compare", compare_methods, "train methods on a table, each at its own learning rate"
    )
    add_compare_arguments(comparing)
    return parser.parse_args(argv)
