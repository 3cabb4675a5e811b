"""A run's way back into the middle of its training: one file, replaced whole.

`checkpoint/training.safetensors` holds the adapter (and a head), the optimizer's moments and the
generators' states as tensors, and everything else as JSON in the file's header. Nothing in it is
pickled. The base is not in it: a continued run initializes again, which gives the same factors and
the same base on the same machine, and on another one the base follows the saved initial factors
(`lora_init.checkpoints`).

The header also holds a checksum of the whole file, and of the files of the run that a continued run
keeps. A run whose files differ by a single bit starts over.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from experiments.errors import DamagedFile, RunFailed
from experiments.run.files import as_object, kind_of, read_regular
from experiments.run.folder import RunFolder, read_metrics, write_bytes

FORMAT = 2
EMPTY_SEAL = b'"sha256":"' + b"0" * 64 + b'"'
"""What the header holds in the place of the checksum while that is computed."""


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: steps done.
        tokens, seconds: seen and spent, by all processes that took turns at the run.
        gradient_norms: of the first step.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    gradient_norms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint file holds."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def progress(self) -> Progress:
        return Progress(**self.facts["progress"])

    @property
    def metrics_size(self) -> int:
        return self.facts["metrics_size"]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }


class Checkpoints:
    """When to save a training, and how it goes on. With nothing given, it is never saved.

    Args:
        folder: of the run.
        saved: where to go on from.
        every: save after so many steps; None: not for that reason.
        minutes: save when so many minutes have passed since the last time; None likewise.
        deadline: when this process has to stop, on `time.monotonic`'s clock.
        metrics_size: tells the bytes of `metrics.jsonl` that belong to the steps done.
    """

    def __init__(
        self,
        folder: RunFolder | None = None,
        saved: Saved | None = None,
        *,
        every: int | None = None,
        minutes: float | None = None,
        deadline: float | None = None,
        metrics_size: Callable[[], int] = lambda: 0,
    ) -> None:
        self.folder = folder
        self.saved = saved
        self.every = every
        self.period = None if minutes is None else 60.0 * minutes
        self.deadline = deadline
        self.metrics_size = metrics_size
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
            raise DamagedFile(self.folder.checkpoint_file, error) from error

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
        """Set this process's generators back. Last of all, since making a loader draws too."""
        part = f"generator.{accelerator.process_index}."
        found = self.saved.part(part) if self.saved else {}
        if not found:
            return  # begun now, or by fewer processes
        try:
            facts = self.saved.facts["generators"][accelerator.process_index]
            set_generators(found, facts, accelerator.device)
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            raise DamagedFile(self.folder.checkpoint_file, error) from error

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
        """Save if it is time to, and stop if there is none left.

        Raises:
            RunFailed: the deadline has passed and steps are missing; what was done is saved.
        """
        self.progress = progress
        due, over = self.what_is_due(progress.step, last, accelerator)
        if due or over:
            self.write(model, optimizer, schedule, accelerator)
        if over:
            raise RunFailed(
                f"the time limit was reached after step {progress.step}; the same command goes on "
                "from there (runtime.time_limit_minutes is the limit of one process)",
                reason="time limit",
                step=progress.step,
            )

    def what_is_due(self, step: int, last: bool, accelerator: Accelerator) -> tuple[bool, bool]:
        """Whether to save, and whether to stop: clocks differ, so the first process decides."""
        moment = time.monotonic()
        due = self.every is not None and step % self.every == 0
        due |= self.period is not None and moment - self.last >= self.period
        over = self.deadline is not None and moment >= self.deadline and not last
        if accelerator.num_processes > 1 and (self.period is not None or self.deadline is not None):
            told = broadcast(torch.tensor([due, over], device=accelerator.device, dtype=torch.int))
            due, over = (bool(flag) for flag in told.tolist())
        return due, over

    def write(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        accelerator: Accelerator,
    ) -> None:
        tensors, facts = get_generators(accelerator.device)
        generators = gather_object([(tensors, facts)])
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
            "run_id": self.folder.id,
            "progress": asdict(self.progress),
            "metrics_size": (size := self.metrics_size()),
            "files": checksums(self.folder, size),
            "param_groups": state["param_groups"],
            "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "generators": [facts for _, facts in generators],
        }
        # Copies: safetensors takes no two tensors that share memory, as tied ones do.
        content = {k: v.detach().cpu().contiguous().clone() for k, v in content.items()}
        header = {"training": json.dumps(described), "sha256": "0" * 64}
        write_bytes(self.folder.checkpoint_file, sealed(save(content, header)))


def read_checkpoint(folder: RunFolder) -> Saved | None:
    """The run's checkpoint; None where there is none.

    Raises:
        DamagedFile: it, or a file of the run that belongs to it, cannot be gone on from.
    """
    path = folder.checkpoint_file
    try:
        if kind_of(folder.path) != "a folder":
            raise DamagedFile(folder.path, f"it is {kind_of(folder.path)}, not a folder")
        if kind_of(path.parent) != "a folder":
            raise DamagedFile(path.parent, f"it is {kind_of(path.parent)}, not a folder")
        saved = parsed(read_regular(path, links=False))
        if saved.facts["run_id"] != folder.id:
            raise ValueError("it is another run's")
        recorded, size = saved.facts["files"], saved.metrics_size
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedFile(path, error) from error
    for name, digest in checksums(folder, size).items():
        if recorded.get(name) != digest:
            raise DamagedFile(folder.path / name, "it is not what the checkpoint was made with")
    read_metrics(folder.metrics_file, size)
    return saved


def checksums(folder: RunFolder, metrics_size: int) -> dict[str, str | None]:
    """By name, the SHA-256 of each file that a continued run keeps; None where one is missing."""
    found: dict[str, str | None] = {}
    for path in (folder.metrics_file, folder.init_file, folder.spectra_file):
        try:
            content = read_regular(path, links=False)
        except FileNotFoundError:
            found[path.name] = None
            continue
        except (OSError, ValueError) as error:
            raise DamagedFile(path, error) from error
        if path == folder.metrics_file:
            content = content[:metrics_size]
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


def sealed(file: bytes) -> bytes:
    """The file with its checksum in the header, computed while that place holds zeros."""
    digest = hashlib.sha256(file).hexdigest().encode()
    return file.replace(EMPTY_SEAL, EMPTY_SEAL.replace(b"0" * 64, digest), 1)


def parsed(file: bytes) -> Saved:
    """What a checkpoint file holds.

    Raises:
        ValueError, KeyError, TypeError, SafetensorError: it is damaged.
    """
    size = int.from_bytes(file[:8], "little")
    header = as_object(file[8 : 8 + size])["__metadata__"]
    digest = header["sha256"].encode()
    blank = file.replace(EMPTY_SEAL.replace(b"0" * 64, digest), EMPTY_SEAL, 1)
    if hashlib.sha256(blank).hexdigest().encode() != digest:
        raise ValueError("its checksum is wrong")
    facts = json.loads(header["training"])
    if facts["format"] != FORMAT:
        raise ValueError(f"its format is {facts['format']}, and this version reads {FORMAT}")
    return Saved(load(file), facts)


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
    random.setstate(as_tuples(facts["python"]))
    kind, keys, *rest = facts["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002


def as_tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value
