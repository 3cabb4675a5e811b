"""Where Python waits for the device, by line of our source.

torch can warn at every operation that waits. The warning is raised inside the call, so the
innermost frame of lora_init is the line that waits.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import lora_init

MESSAGE = "synchronizing CUDA operation"
PACKAGE = Path(lora_init.__file__).parent
LISTED = 12
"""Lines of a row that a report lists."""


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Count the waits inside this context by "file.py:line". Without CUDA there are none."""
    found: Counter[str] = Counter()

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if MESSAGE in str(message):
            found[source_line()] += 1

    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message=f".*{MESSAGE}")
        warnings.showwarning = show
        try:
            if before is not None:
                torch.cuda.set_sync_debug_mode("warn")
            yield found
        finally:
            if before is not None:
                torch.cuda.set_sync_debug_mode(before)


def source_line() -> str:
    """The innermost line of lora_init on the stack, else the innermost line outside torch."""
    frame, other = sys._getframe(2), "elsewhere"
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
        if other == "elsewhere" and not {"torch", "warnings.py"} & set(path.parts):
            other = f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return other
