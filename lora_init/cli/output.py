"""What the commands print: text or JSON on standard output, remarks on standard error."""

from __future__ import annotations

import json
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from lora_init.config.file import CONFIG_NAME

_RESULTS: ContextVar[TextIO | None] = ContextVar("_RESULTS", default=None)


def emit(arguments: Namespace, data: Any, text: str) -> None:
    """Print the result: `data` as JSON with --json, otherwise `text`."""
    if arguments.json:
        text = json.dumps(data, indent=2, ensure_ascii=False, default=str)
    print(text, file=_RESULTS.get() or sys.stdout)


@contextmanager
def results_only() -> Iterator[None]:
    """Keep standard output for `emit`: what other libraries print there goes to standard error."""
    token = _RESULTS.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _RESULTS.reset(token)


def check_folder(out: Path) -> None:
    """Refuse a folder of results that cannot be made or already has content.

    Raises:
        ValueError: the message names OUT. Nothing is made.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT={str(out)!r} is a file: must be a folder")
    if out.is_dir() and any(out.iterdir()):
        what = "an adapter" if (out / CONFIG_NAME).is_file() else "other files"
        raise ValueError(f"OUT={str(out)!r} contains {what}: must be empty or a new folder")
    existing = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"OUT={str(out)!r} cannot be made, because {str(existing)!r} is not a folder that you "
            "can write to: pass another folder"
        )


def remark(text: str) -> None:
    """Print a line on standard error, so that standard output stays valid JSON."""
    print(text, file=sys.stderr)


@contextmanager
def short_warnings() -> Iterator[None]:
    """Print each warning as one remark, without the place in the code."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        remark(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = show
        yield
