"""Small checks of single promises that a GPU could break."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from experiments.gpu.lifecycle import relative
from experiments.gpu.specimens import Specimen, decaying
from experiments.gpu.task import Task
from lora_init import LoraConfig, get_peft_model, linalg
from lora_init.quantization import Quantizer
from lora_init.weights.checksum import checksum
from lora_init.weights.fingerprint import fingerprint

FLOAT32 = torch.float32
QUANTIZERS = (
    Quantizer(),
    Quantizer(double=True),
    Quantizer("fp4"),
    Quantizer("nf2", 2),
    Quantizer("uniform", 4),
    Quantizer("int8", 8),
)


def record(task: Task, name: str, check: Callable[[Task], tuple[float, float]]) -> None:
    """Run a check: it returns a figure and the most that it may be."""
    figure, limit = check(task)
    task.record.row(name, figure=figure, limit=limit)
    if not figure <= limit:
        task.record.refute(f"{name}: {figure:.1e}, must be at most {limit:.0e}")


@contextlib.contextmanager
def tf32(used: bool) -> Iterator[None]:
    """The process-wide setting that a training script may change at any time."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if used else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def tf32_flipped(task: Task) -> tuple[float, float]:
    """Injected with TF32 products, unloaded without: the base weights come back."""
    base = Specimen("Linear", FLOAT32).build().to(task.device)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    names = [f"layers.{index}" for index in range(3)]
    settings = LoraConfig(r=8, target_modules=names, init_lora_weights="pissa")
    with tf32(True):
        model = get_peft_model(base, settings, cache=False)
    with tf32(False):
        plain = model.unload().state_dict()
    errors = [float((plain[name] - old).abs().max() / old.abs().max())
              for name, old in before.items() if "weight" in name]  # fmt: skip
    return max(errors), 1e-6


def default_device(task: Task) -> tuple[float, float]:
    """With a default device, every drawing method gives the adapter that it gives without."""
    worst = 0.0
    for method in ("kaiming", "gaussian", "orthogonal", "pissa", "loftq", "matched_norm"):
        made = []
        for inside in (torch.device("cpu"), task.device):
            specimen = Specimen("Linear", FLOAT32, 64)
            base = specimen.build().to(task.device)
            settings = LoraConfig(r=8, target_modules=["layers.0"], init_lora_weights=method)
            with inside:
                model = get_peft_model(base, settings, keep_original=True, cache=False)
            made.append(model.layers["layers.0"])
        here, there = made
        worst = max(worst, relative(there.lora_A.detach(), here.lora_A.detach()))
    return worst, 1e-6


def olora_signs(task: Task) -> tuple[float, float]:
    """The signs of OLoRA's factors are LAPACK's."""
    worst = 0.0
    for rows in (96, 400):
        weight = decaying(rows, 96, torch.Generator().manual_seed(rows))
        expected = linalg.leading_qr(weight, 8)[0]
        basis = linalg.leading_qr(weight.to(task.device), 8)[0].cpu()
        worst = max(worst, float((basis - expected).abs().max()))
    return worst, 1e-4


def low_ranks(rank: int) -> Callable[[Task], tuple[float, float]]:
    """A stack of matrices of this rank: orthonormal vectors, no NaN."""

    def check(task: Task) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(rank)
        left, right = (torch.randn(3, 320, 8, generator=generator) for _ in range(2))
        left[..., rank:] = 0
        stack = (left @ right.mT).to(task.device)
        worst = 0.0
        for decompose in (linalg.top_singular, linalg.bottom_singular):
            found = decompose(stack, 16)
            for vectors in (found.left.double(), found.right.double()):
                unit = torch.eye(16, dtype=torch.float64, device=task.device)
                error = (vectors.mT @ vectors - unit).abs().max()
                worst = max(worst, float(error.nan_to_num(nan=1.0)))
        return worst, 1e-5

    return check


def nan_is_named(task: Task) -> tuple[float, float]:
    """A weight with NaN is refused by name, and the model stays as it was. 1: not so."""
    base = Specimen("Linear", FLOAT32).build().to(task.device)
    with torch.no_grad():
        base.get_submodule("layers.1").weight[3, 5] = float("nan")
    wrong = 0
    for method in ("pissa", "milora", "olora", "kaiming"):
        names = [f"layers.{index}" for index in range(3)]
        settings = LoraConfig(r=8, target_modules=names, init_lora_weights=method)
        try:
            get_peft_model(base, settings, cache=False)
        except ValueError as error:
            wrong += "layers.1" not in str(error)
        else:
            wrong += 1
        wrong += any(type(module) is not nn.Linear for module in base.layers)
    return float(wrong), 0.0


def quantizer_bits(task: Task) -> tuple[float, float]:
    """Quantizers give the same values on both devices: how many of them do not."""
    weight = decaying(192, 256, torch.Generator().manual_seed(2))
    different = 0
    for quantizer in QUANTIZERS:
        there = quantizer.roundtrip(weight.to(task.device)).cpu()
        if not torch.equal(there, quantizer.roundtrip(weight)):
            different += 1
            task.record.note(f"{quantizer.name}: values differ from the CPU's in their last bits")
    # Means are summed in another order, so these two may differ in the last bit.
    return float(different), 2.0


def fingerprints(task: Task) -> tuple[float, float]:
    """Fingerprint and checksum of a weight do not depend on its device. 1: they do."""
    weight = decaying(192, 256, torch.Generator().manual_seed(2))
    there = weight.to(task.device)
    same = fingerprint(there) == fingerprint(weight) and checksum(there) == checksum(weight)
    return float(not same), 0.0


CHECKS: dict[str, Callable[[Task], tuple[float, float]]] = {
    "TF32 changed between inject and unload": tf32_flipped,
    "default device": default_device,
    "OLoRA's signs": olora_signs,
    "stack of zero matrices": low_ranks(0),
    "stack of rank 3": low_ranks(3),
    "NaN is refused by name": nan_is_named,
    "quantizers": quantizer_bits,
    "fingerprint and checksum": fingerprints,
}
