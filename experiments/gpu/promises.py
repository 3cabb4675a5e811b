"""Small checks of single promises that a GPU could break.

Each check returns a figure and the most that it may be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from lora_init import LoraConfig, get_peft_model, linalg
from lora_init.injection.checksum import checksum
from lora_init.quantization import Quantizer
from lora_init.weights.fingerprint import fingerprint

from .lifecycle import relative
from .specimens import Specimen, decaying
from .task import Task

FLOAT32 = torch.float32
LAYERS = ["layers.0", "layers.1", "layers.2"]
QUANTIZERS = (
    Quantizer(),
    Quantizer(double=True),
    Quantizer("fp4"),
    Quantizer("nf2", 2),
    Quantizer("uniform", 4),
    Quantizer("int8", 8),
)
Check = Callable[[Task], tuple[float, float]]


def record(task: Task, name: str, check: Check) -> None:
    """Run a check and record its figure."""
    figure, limit = check(task)
    task.record.row(name, figure=figure, limit=limit)
    if not figure <= limit:
        task.record.refute(f"{name}: {figure:.1e}, must be at most {limit:.0e}")


@contextlib.contextmanager
def tf32(used: bool) -> Iterator[None]:
    """The process-wide setting, which a training script may change at any time."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if used else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def config(method: str) -> LoraConfig:
    return LoraConfig(r=8, target_modules=LAYERS, init_lora_weights=method)


def tf32_changed(task: Task) -> tuple[float, float]:
    """Injected with TF32 and unloaded without it, a model gets its base weights back."""
    base = Specimen("Linear", FLOAT32).build().to(task.device)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    with tf32(True):
        model = get_peft_model(base, config("pissa"), cache=False)
    with tf32(False):
        plain = model.unload().state_dict()
    names = [f"{name}.weight" for name in LAYERS]
    return max(
        float((plain[n] - before[n]).abs().max() / before[n].abs().max()) for n in names
    ), 1e-6


def default_device(task: Task) -> tuple[float, float]:
    """torch's default device does not change what a drawing method draws."""
    worst = 0.0
    for method in ("kaiming", "gaussian", "orthogonal", "pissa", "loftq", "matched_norm"):
        factors = []
        for default in (torch.device("cpu"), task.device):
            base = Specimen("Linear", FLOAT32, 64).build().to(task.device)
            with default:
                model = get_peft_model(base, config(method), keep_original=True, cache=False)
            factors.append(model.layers["layers.0"].lora_A.detach())
        worst = max(worst, relative(factors[1], factors[0]))
    return worst, 1e-6


def olora_signs(task: Task) -> tuple[float, float]:
    """OLoRA's factors have the signs of LAPACK."""
    worst = 0.0
    for rows in (96, 400):
        weight = decaying(rows, 96, torch.Generator().manual_seed(rows))
        expected = linalg.leading_qr(weight, 8)[0]
        basis = linalg.leading_qr(weight.to(task.device), 8)[0].cpu()
        worst = max(worst, float((basis - expected).abs().max()))
    return worst, 1e-4


def low_rank(rank: int, task: Task) -> tuple[float, float]:
    """Matrices of low rank get orthonormal vectors without NaN."""
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(3, 320, 8, generator=generator) for _ in range(2))
    left[..., rank:] = 0
    stack = (left @ right.mT).to(task.device)
    unit = torch.eye(16, dtype=torch.float64, device=task.device)
    worst = 0.0
    for decompose in (linalg.top_singular, linalg.bottom_singular):
        found = decompose(stack, 16)
        for vectors in (found.left.double(), found.right.double()):
            error = (vectors.mT @ vectors - unit).abs().max()
            worst = max(worst, float(error.nan_to_num(nan=1.0)))
    return worst, 1e-5


def nan_is_named(task: Task) -> tuple[float, float]:
    """An error names a weight with NaN and leaves the model unchanged. Counts the exceptions."""
    base = Specimen("Linear", FLOAT32).build().to(task.device)
    with torch.no_grad():
        base.get_submodule("layers.1").weight[3, 5] = float("nan")
    wrong = 0
    for method in ("pissa", "milora", "olora"):  # these read the weights
        try:
            get_peft_model(base, config(method), cache=False)
        except ValueError as error:
            wrong += "layers.1" not in str(error)
        else:
            wrong += 1
        wrong += any(type(module) is not nn.Linear for module in base.layers)
    return float(wrong), 0.0


def quantizer_values(task: Task) -> tuple[float, float]:
    """Quantizers give the same values on both devices. Counts those that do not."""
    weight = decaying(192, 256, torch.Generator().manual_seed(2))
    different = 0
    for quantizer in QUANTIZERS:
        values = quantizer.roundtrip(weight.to(task.device)).cpu()
        if not torch.equal(values, quantizer.roundtrip(weight)):
            different += 1
            task.record.note(f"{quantizer.name}: values differ from the CPU's in their last bits")
    # Two of them sum means, whose order may change the last bit.
    return float(different), 2.0


def fingerprints(task: Task) -> tuple[float, float]:
    """Fingerprint and checksum of a weight do not depend on its device. 1 if they do."""
    weight = decaying(192, 256, torch.Generator().manual_seed(2))
    there = weight.to(task.device)
    same = fingerprint(there) == fingerprint(weight) and checksum(there) == checksum(weight)
    return float(not same), 0.0


CHECKS: dict[str, Check] = {
    "TF32 changed between inject and unload": tf32_changed,
    "default device": default_device,
    "OLoRA's signs": olora_signs,
    "stack of zero matrices": partial(low_rank, 0),
    "stack of rank 3": partial(low_rank, 3),
    "NaN is refused by name": nan_is_named,
    "quantizers": quantizer_values,
    "fingerprint and checksum": fingerprints,
}
