"""CUDA streams, where work goes on in other threads.

A new thread has the default stream, whatever the stream of the thread that started it. It may read
memory that the other stream has not written yet.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def wait_for_writes(devices: Iterable[torch.device]) -> None:
    """Wait for what this thread has started on these devices; on a CPU nothing is left to do."""
    for device in set(devices):
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
