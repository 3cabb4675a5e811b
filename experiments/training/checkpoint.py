"""The training checkpoint: one file, replaced whole, from which a run continues.

The file holds the adapter (and a head), the optimizer's moments and the generators' states as
tensors, and everything else as JSON in its header. Nothing in it is pickled. The base is not in it:
a continued run initializes again, which gives the same factors and the same base.

The header holds a checksum of the whole file, so a single flipped bit is detected.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from safetensors.torch import load, save
from torch import Tensor

from ..errors import DamagedFile, RunFailed

FORMAT = 2
FORMAT_WITHOUT_CHECKSUM = 1
EMPTY_SEAL = b'"sha256":"' + b"0" * 64 + b'"'
"""The checksum's place in the header while the checksum is computed."""


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: steps done.
        tokens, seconds: totals over all processes that worked on the run.
        gradient_norms: of the first step.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    gradient_norms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """The content of the checkpoint file at `path`."""

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def progress(self) -> Progress:
        return Progress(**self.facts["progress"])

    @property
    def metrics_size(self) -> int:
        return self.facts["metrics_size"]

    def part(self, prefix: str) -> dict[str, Tensor]:
        found = {key: value for key, value in self.tensors.items() if key.startswith(prefix)}
        return {key.removeprefix(prefix): value for key, value in found.items()}


class Checkpoints:
    """When to save a training, and how to continue it. Without arguments it saves nothing.

    Args:
        save: writes the bytes of a checkpoint file.
        describe: what the run adds to the header, such as its id.
        saved: the checkpoint to continue from.
        every: save after this many steps; None does not.
        minutes: save when this many minutes have passed since the last time; None does not.
        deadline: when this process must stop, on `time.monotonic`'s clock.
    """

    def __init__(
        self,
        save: Callable[[bytes], None] = lambda content: None,
        describe: Callable[[], dict[str, Any]] = dict,
        saved: Saved | None = None,
        *,
        every: int | None = None,
        minutes: float | None = None,
        deadline: float | None = None,
    ) -> None:
        self.save, self.describe, self.saved = save, describe, saved
        self.every = every
        self.period = None if minutes is None else 60.0 * minutes
        self.deadline = deadline
        self.progress = saved.progress if saved else Progress()
        self.last = time.monotonic()

    def restore(
        self, optimizer: torch.optim.Optimizer, schedule: Any, accelerator: Accelerator
    ) -> None:
        """Set the optimizer, the schedule and the gradient scaler back to the saved step.

        Raises:
            DamagedFile: the checkpoint does not fit them.
        """
        if self.saved is None:
            return
        try:
            self.restore_optimizer(optimizer, schedule, accelerator)
        except (ValueError, LookupError, TypeError, RuntimeError, AttributeError) as error:
            raise DamagedFile(self.saved.path, error) from error

    def restore_optimizer(
        self, optimizer: torch.optim.Optimizer, schedule: Any, accelerator: Accelerator
    ) -> None:
        facts = self.saved.facts
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in self.saved.part("optimizer.").items():
            number, name = key.split(".")
            state.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": facts["param_groups"]})
        schedule.load_state_dict({**schedule.state_dict(), **facts["schedule"]})
        if accelerator.scaler is not None and facts["scaler"]:
            accelerator.scaler.load_state_dict(facts["scaler"])

    def restore_generators(self, accelerator: Accelerator) -> None:
        """Set this process's generators back, after the data loader has drawn from them."""
        part = f"generator.{accelerator.process_index}."
        found = self.saved.part(part) if self.saved else {}
        if not found:
            return  # a new training, or one that fewer processes started
        try:
            facts = self.saved.facts["generators"][accelerator.process_index]
            set_generators(found, facts, accelerator.device)
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            raise DamagedFile(self.saved.path, error) from error

    def step_done(
        self,
        progress: Progress,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        accelerator: Accelerator,
        *,
        last: bool,
    ) -> None:
        """Save if a checkpoint is due, and stop if the time is over.

        Raises:
            RunFailed: the deadline has passed and steps are missing; what was done is saved.
        """
        self.progress = progress
        due, over = self.what_is_due(progress.step, last, accelerator)
        if due or over:
            self.write(model, optimizer, schedule, accelerator)
        if over:
            raise RunFailed(
                f"the time limit was reached after step {progress.step}; the same command "
                "continues from there (runtime.time_limit_minutes limits one process)",
                reason="time limit",
                step=progress.step,
            )

    def what_is_due(self, step: int, last: bool, accelerator: Accelerator) -> tuple[bool, bool]:
        """Whether to save, and whether to stop. Clocks differ, so the first process decides."""
        moment = time.monotonic()
        due = self.every is not None and step % self.every == 0
        due |= self.period is not None and moment - self.last >= self.period
        over = self.deadline is not None and moment >= self.deadline and not last
        if accelerator.num_processes > 1 and (self.period is not None or self.deadline is not None):
            flags = torch.tensor([due, over], device=accelerator.device, dtype=torch.int)
            due, over = (bool(flag) for flag in broadcast(flags).tolist())
        return due, over

    def write(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        accelerator: Accelerator,
    ) -> None:
        generators = gather_object([get_generators(accelerator.device)])
        self.last = time.monotonic()
        if not accelerator.is_main_process:
            return
        content = {f"model.{name}": value for name, value in model.state_dict().items()}
        state = optimizer.state_dict()
        for number, moments in state["state"].items():
            content |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
        for process, (tensors, _) in enumerate(generators):
            content |= {f"generator.{process}.{name}": value for name, value in tensors.items()}
        described = {
            "format": FORMAT,
            "progress": asdict(self.progress),
            **self.describe(),
            "param_groups": state["param_groups"],
            "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "generators": [facts for _, facts in generators],
        }
        # Copies: safetensors refuses tensors that share memory, as tied ones do.
        content = {k: v.detach().cpu().contiguous().clone() for k, v in content.items()}
        header = {"training": json.dumps(described), "sha256": "0" * 64}
        self.save(sealed(save(content, header)))


def sealed(file: bytes) -> bytes:
    """The file with its checksum in the header, computed while that place holds zeros."""
    digest = hashlib.sha256(file).hexdigest().encode()
    return file.replace(EMPTY_SEAL, EMPTY_SEAL.replace(b"0" * 64, digest), 1)


def parse_checkpoint(path: Path, file: bytes) -> Saved:
    """Parse the bytes of the checkpoint file at `path`.

    Format 1, which earlier versions wrote, has no checksum.

    Raises:
        ValueError, KeyError, TypeError, RecursionError, SafetensorError: it is damaged.
    """
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])["__metadata__"]
    facts = json.loads(header["training"])
    if facts["format"] not in (FORMAT_WITHOUT_CHECKSUM, FORMAT):
        raise ValueError(f"format {facts['format']} is not supported: must be 1 or {FORMAT}")
    if facts["format"] == FORMAT:
        digest = header["sha256"].encode()
        blank = file.replace(EMPTY_SEAL.replace(b"0" * 64, digest), EMPTY_SEAL, 1)
        if hashlib.sha256(blank).hexdigest().encode() != digest:
            raise ValueError("its checksum is wrong")
    return Saved(path, load(file), facts)


def get_generators(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of torch's, Python's and numpy's global generators."""
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - what libraries draw from
    return tensors, {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}


def set_generators(tensors: dict[str, Tensor], facts: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    version, numbers, gauss = facts["python"]  # JSON has lists where Python wants tuples
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = facts["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
