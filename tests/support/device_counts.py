"""How often a method uses an accelerator to initialize a stack of two equal layers.

    python tests/support/device_counts.py

writes the table of docs/gpu.md. The device is simulated: every operation on it counts as a launch,
except views and allocations. Two Linear layers in bfloat16 are so large that Krylov spaces are used
as for large layers. Statistics are there already, and no cache is used.
"""

import functools
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from unittest import mock

import simulated_device
import torch
from layers import parts_of
from second import nearby_by_default
from simulated_device import CPU, CUDA, place, simulated_cuda, tensors_in
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_init import LoraConfig, get_peft_model, list_initializers
from lora_init.calibration.result import Calibration
from lora_init.initialize import steps
from lora_init.layer import LayerStatistics
from lora_init.linalg import dense
from lora_init.linalg.mixed_products import mixed_support
from lora_init.linalg.moments import InputStatistics

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
ROWS, COLUMNS, RANK = 320, 288, 4
# As for matrices of thousands of rows: Krylov spaces of W, not dense solvers of its Gram matrix.
LIKE_LARGE_MATRICES = {"GRAM_DIMENSION": 0, "DENSE_SHARE": 0.2, "DENSE_DIMENSION": 64}

DECOMPOSITIONS = {
    "linalg_qr": "qr",
    "_linalg_eigh": "eigh",
    "_linalg_svd": "svd",
    "linalg_cholesky_ex": "cholesky",
    "linalg_solve_triangular": "solves",
    "linalg_lu_factor_ex": "solves",
    "linalg_lu_solve": "solves",
    "_linalg_solve_ex": "solves",
}
# What CUDA's implementation reads on the host to check for errors.
HIDDEN_READS = {"_linalg_eigh": 1, "_linalg_svd": 2}
ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
FREE = ALLOCATIONS | {"_unsafe_view", "lift_fresh", "is_pinned", "detach"}
READING = {"_local_scalar_dense", "nonzero", "equal"}
INDEXING = {"index", "index_put", "index_put_"}


@dataclass
class Counts:
    """Of one initialization.

    Attributes:
        launches: operations on the device.
        reads: how often the host waits for the device, to copy something or to decide.
        uploads: copies from the host to the device.
        qr, eigh, svd, cholesky, solves: calls on the device, each for a whole stack.
        host: decompositions of single matrices on the host.
    """

    launches: int = 0
    reads: int = 0
    uploads: int = 0
    qr: int = 0
    eigh: int = 0
    svd: int = 0
    cholesky: int = 0
    solves: int = 0
    host: int = 0


COLUMNS_OF_TABLE = [field.name for field in fields(Counts)]


class Counter(TorchDispatchMode):
    """Counts operations, inside the simulation, while it is active."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = tensors_in(args, kwargs)
        there = any(place(tensor) == CUDA for tensor in [*given, *tensors_in(result)])
        if not there:
            self.counts.host += name in DECOMPOSITIONS and name != "linalg_solve_triangular"
            return result
        self.counts.launches += not (is_view(func) or name in FREE or name in READING)
        self.counts.reads += name in READING or masks(name, args)
        self.counts.reads += HIDDEN_READS.get(name, 0)
        if name in DECOMPOSITIONS:
            part = DECOMPOSITIONS[name]
            setattr(self.counts, part, getattr(self.counts, part) + 1)
        return result


def is_view(func):
    returned = [one.alias_info for one in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def masks(name, args):
    """Whether boolean tensors on the device choose entries, whose number the host must know."""
    chosen = [one for one in args[1] if one is not None] if name in INDEXING else []
    return any(one.dtype == torch.bool and place(one) == CUDA for one in chosen)


@contextmanager
def counting(counts):
    """Count operations and copies between the devices."""
    move = simulated_device.moved

    def moved(tensor, where, *settings, **more):
        counts.reads += place(tensor) == CUDA and where == CPU
        counts.uploads += place(tensor) == CPU and where == CUDA
        return move(tensor, where, *settings, **more)

    with mock.patch.object(simulated_device, "moved", moved), Counter(counts):
        yield


@functools.cache
def weight_of(seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, COLUMNS, generator=generator))[0]
        for size in (ROWS, COLUMNS)
    )
    return (left * torch.arange(1, COLUMNS + 1) ** -1.0) @ right.T


def statistics_of(names, request, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, COLUMNS + 1) ** -0.5
    layers = {}
    for name in names:
        moments = InputStatistics.of_rows(torch.randn(600, COLUMNS, generator=generator) * spread)
        if request.smallest:
            moments.covariance = moments.covariance.double()
        found = LayerStatistics(**parts_of(request, moments, weight_of(seed + int(name))))
        layers[name] = found.to(torch.device(CUDA))
    return Calibration({request: layers}, 600, 1)


def counted(setting):
    """The counts of one `init_lora_weights`."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(2)))
    for seed, layer in enumerate(base):
        layer.weight.data = weight_of(seed).clone()
    base.to(torch.bfloat16)
    counts = Counts()
    config = LoraConfig(r=RANK, target_modules=["0", "1"], init_lora_weights=setting)

    def counts_calls(function):
        def wrapped(*args, **kwargs):
            with counting(counts):
                return function(*args, **kwargs)

        return wrapped

    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(dense, **LIKE_LARGE_MATRICES))
        stack.enter_context(simulated_cuda())
        mixed_support(torch.device(CUDA, 0), torch.bfloat16)  # asked once in a process
        plan = get_peft_model(base, config, dry_run=True)
        calibration = None
        if plan.calibration is not None:
            calibration = statistics_of(["0", "1"], plan.calibration, 7)
        for name in ("initialize", "_allocated"):
            stack.enter_context(mock.patch.object(steps, name, counts_calls(getattr(steps, name))))
        get_peft_model(base.cuda(), config, calibration=calibration, cache=False)
    return counts


SETTINGS = {spec.name: spec.name for spec in list_initializers()} | {
    "pissa_niter_4": "pissa_niter_4",
    "corda_kpm": {"name": "corda", "corda_method": "kpm"},
}


def table():
    """All methods' counts in Markdown, as docs/gpu.md has them."""
    lines = ["| method | " + " | ".join(COLUMNS_OF_TABLE) + " |", "|---" * 10 + "|"]
    for name in sorted(SETTINGS):
        counts = counted(SETTINGS[name])
        cells = [str(getattr(counts, column)) for column in COLUMNS_OF_TABLE]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with nearby_by_default():
        made = table()
    before, rest = PAGE.read_text().split(made.splitlines()[0], 1)
    after = rest.split("\n\n", 1)[1]
    PAGE.write_text(f"{before}{made}\n\n{after}")
