"""What the commands print: text or JSON on standard output, remarks on standard error."""

from __future__ import annotations

import json
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def emit(arguments: Namespace, data: Any, text: str) -> None:
    """Print the result: `data` as JSON with --json, otherwise `text`."""
    if arguments.json:
        print(json.dumps(data, indent=2, ensure_ascii=False, default=str))
    else:
        print(text)


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
