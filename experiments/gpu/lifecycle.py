"""The promises about an adapter from injection to unloading, measured on its device.

Each figure is a relative error divided by its promised tolerance. Above 1 the promise is broken.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_init import LoraModel
from lora_init.layers import LoraLayer
from lora_init.weights.kinds import oriented_weight

from .specimens import PACKED

FLOAT32_TOLERANCE = 2e-6
UNLOAD_TOLERANCE = 1e-6
MERGE_FACTOR, DISABLE_FACTOR = 9, 3
PACKED_MERGE = 0.4  # a merge quantizes the weight again


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Switch TF32 off for float32 convolutions. cuDNN uses it by default."""
    cudnn = torch.backends.cudnn
    if hasattr(getattr(cudnn, "conv", None), "fp32_precision"):  # since torch 2.9
        owner, name, exact = cudnn.conv, "fp32_precision", "ieee"
    else:
        owner, name, exact = cudnn, "allow_tf32", False
    before = getattr(owner, name)
    setattr(owner, name, exact)
    try:
        yield
    finally:
        setattr(owner, name, before)


@dataclass(frozen=True)
class Life:
    """Errors over their tolerances: the output at step 0, then disabled, merged and unloaded."""

    step_0: float | None
    disabled: float
    merged: float
    unloaded: float

    @property
    def broken(self) -> list[str]:
        """The names of the broken promises. NaN breaks a promise."""
        return [name for name, value in vars(self).items() if value is not None and not value <= 1]


@torch.no_grad()
def lived(model: LoraModel, base: nn.Module, x: Tensor, *, keeps_output: bool) -> Life:
    """Disable, merge, unmerge and unload the adapter, and measure each step.

    Args:
        base: the model before injection, on the same device.
        x: inputs of the whole model.
        keeps_output: whether the method promises the base's output at step 0.
    """
    names = list(model.layers)
    dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)
    epsilon = FLOAT32_TOLERANCE if dtype == torch.float32 else torch.finfo(dtype).eps
    packed = any(layer.module_type in PACKED for layer in model.layers.values())
    ratios = {name: ratio(model.layers[name], base.get_submodule(name)) for name in names}
    tolerance = epsilon * max(ratios.values())
    step_0 = None
    if keeps_output:
        gaps = layer_gaps(model, base, x)
        step_0 = max(gap / (epsilon * ratios[name]) for name, gap in gaps.items())
    expected = base(x)
    disturb(model)
    trained = model(x)
    with model.disable_adapter():
        disabled = relative(model(x), expected) / (DISABLE_FACTOR * tolerance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a packed merge warns about its error
        model.merge_adapter()
    merged = relative(model(x), trained) / (PACKED_MERGE if packed else MERGE_FACTOR * tolerance)
    model.unmerge_adapter()
    plain = model.unload()
    unloaded = 0.0
    for name in names:
        weight = oriented_weight(base.get_submodule(name))
        error = (oriented_weight(plain.get_submodule(name)) - weight).abs().max()
        unloaded = max(unloaded, float(error / weight.abs().max()) / UNLOAD_TOLERANCE)
    return Life(step_0, disabled, merged, unloaded)


def layer_gaps(model: LoraModel, base: nn.Module, x: Tensor) -> dict[str, float]:
    """Compare each adapted layer's output with its original module's, for the base's inputs."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str):
        def hook(module: nn.Module, given: tuple, result: Tensor) -> None:
            seen[name] = given[0], result

        return hook

    handles = [base.get_submodule(name).register_forward_hook(keep(name)) for name in model.layers]
    try:
        base(x)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: relative(model.layers[name](given), result, without_bias(base, name, result))
        for name, (given, result) in seen.items()
    }


def without_bias(base: nn.Module, name: str, result: Tensor) -> Tensor:
    """The output minus the bias: the scale of the tolerance."""
    module = base.get_submodule(name)
    bias = getattr(module, "bias", None)
    if bias is None:
        return result
    return result - (bias[:, None, None] if isinstance(module, nn.Conv2d) else bias)


def ratio(layer: LoraLayer, module: nn.Module) -> float:
    """max(1, ‖s B0 A0‖ / ‖W‖): the factor in the tolerances."""
    if layer.initial_lora_A is None:
        return 1.0
    product = layer.scaling * layer.initial_lora_B.double() @ layer.initial_lora_A.double()
    return max(1.0, float(product.norm() / oriented_weight(module).double().norm()))


def disturb(model: nn.Module, size: float = 0.05) -> None:
    """Change every trainable tensor, as training does."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            scale = float(parameter.float().square().mean().sqrt()) or parameter.shape[-1] ** -0.5
            parameter.add_((size * scale * noise).to(parameter))


def relative(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """‖actual - expected‖ / ‖scale‖ in float64."""
    scale = expected if scale is None else scale
    difference = actual.double() - expected.double()
    return float(difference.norm() / scale.double().norm())


def twin(model: nn.Module) -> nn.Module:
    """A copy that computes what the adapter's base computes."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if type(module).__name__ == "Linear4bit":
            from lora_init.weights.kinds import known_format

            known_format(module).keep_plain(module)
    return made
