"""Where Python waits for the device, by line of our source.

torch warns at every operation that waits, when asked to. The warning is raised inside the call, so
the innermost frame of our code is the line that waits.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MESSAGE = "synchronizing CUDA operation"


@contextmanager
def counted_synchronizations() -> Iterator[Counter[str]]:
    """Count the waits inside this context: "file.py:line" -> how many. Empty without CUDA."""
    found: Counter[str] = Counter()

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if MESSAGE in str(message):
            found[our_line()] += 1

    cuda = torch.cuda.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message=f".*{MESSAGE}")
        warnings.showwarning = show
        before = torch.cuda.get_sync_debug_mode() if cuda else 0
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode(before)


def our_line() -> str:
    """The innermost line of lora_init on the stack, else the innermost line outside of torch."""
    frame, other = sys._getframe(2), None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        line = f"{path.name}:{frame.f_lineno}"
        if "lora_init" in path.parent.parts and "site-packages" not in path.parts:
            parts = path.parts
            inside = len(parts) - 1 - parts[::-1].index("lora_init")
            return "/".join(parts[inside + 1 :]) + f":{frame.f_lineno}"
        if other is None and not {"torch", "warnings.py", Path(__file__).name} & set(path.parts):
            other = line
        frame = frame.f_back
    return other or "elsewhere"
