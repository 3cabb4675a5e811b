"""Probe numerically whether a module computes the product with its stored weight, plus its bias.

A subclass of nn.Linear may override `forward`, and a quantizer may set `forward` on the instance.
The function is therefore evaluated, because neither the class name nor the code identifies it. The
probe runs a copy of the module, whose weight, buffers, hooks and mode do not change.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_init.linalg.precision import full_precision
from lora_init.weights.format import WEIGHT, Finding
from lora_init.weights.patches import convolve

if TYPE_CHECKING:
    from lora_init.weights.float import FloatFormat

SCALES = (1e-3, 1.0, 1e3)
"""Scales of the inputs. The largest exposes clamps, the smallest a quantizer's fixed step."""

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Tolerance relative to ‖x‖ ‖w‖, row by row. Quantized inputs cause errors of 1e-4 and more."""

LARGEST_QUANTIZATION_ERROR = 0.25
"""Tolerance relative to the output norm. 4-bit inputs cause 0.1, a different function 0.5."""


def probe(module: nn.Module, stored: FloatFormat) -> Finding:
    """Compare the module's function with the product of its stored weight.

    Args:
        module: a float module whose weight is in memory.
        stored: how the weight is stored and used.
    """
    weight: Tensor = getattr(module, WEIGHT)
    own = weight.dtype
    # Storage in float8 is cast before the product, and torch has no products of it on a CPU.
    wide = torch.float32 if own.itemsize == 1 else torch.promote_types(own, torch.float32)
    dtypes = dict.fromkeys((wide,) if own.itemsize == 1 else (own, wide))
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), full_precision():
        found = [_of_dtype(module, stored, dtype) for dtype in dtypes]
    reasons = [finding.reason for finding in found if finding.reason is not None]
    return Finding(reasons[0] if reasons else None, all(finding.is_close for finding in found))


def _of_dtype(module: nn.Module, stored: FloatFormat, dtype: torch.dtype) -> Finding:
    is_close, reason = True, None
    for training in dict.fromkeys((module.training, True, False)):
        twin, function = _twin(module, dtype)
        if twin is not module:
            twin.train(training)
        elif training != module.training:
            continue
        try:
            errors = _errors(twin, function, stored)
            is_close &= min(_relative_errors(twin, function, stored)) <= LARGEST_QUANTIZATION_ERROR
            if max(errors) > 1:
                mode = "training" if training else "eval"
                reason = f"its {mode} output is not the product with its weight plus its bias"
            elif twin is not module and (names := _perturb(twin)):
                errors = _errors(twin, function, stored)
                if max(errors) > 1:
                    reason = f"its output depends on {', '.join(names)} too"
        except Exception as error:
            return Finding(f"its forward fails in the probe ({error})", False)
    return Finding(reason, is_close)


def _twin(module: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, Callable]:
    """A copy without hooks, and its forward; or the module itself if its forward is bound to it."""
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "__self__", None) is not module:
        return module, forward
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    for name, value in vars(module).items():
        if "hooks" in name:
            vars(twin)[name] = type(value)() if hasattr(value, "clear") else value
        elif name not in ("_parameters", "_buffers", "_modules") and not callable(value):
            vars(twin)[name] = _copied(value)
    twin._parameters = {n: None if p is None else nn.Parameter(_cast(p, dtype), requires_grad=False)
                        for n, p in module._parameters.items()}  # fmt: skip
    twin._buffers = {n: None if b is None else _cast(b, dtype) for n, b in module._buffers.items()}
    twin._modules = {n: copy.deepcopy(m) for n, m in module._modules.items()}
    for child in twin.children():
        child.to(dtype)
    if forward is None:
        return twin, twin.forward
    return twin, types.MethodType(forward.__func__, twin)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # objects that cannot be copied, such as locks and handles, are shared
        return value


def _perturb(twin: nn.Module) -> list[str]:
    """Change all floating-point tensors except weight and bias; return their names."""
    names = []
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        if name not in (WEIGHT, "bias") and tensor.is_floating_point():
            tensor.add_(tensor.abs().add(1) * (1 + torch.rand_like(tensor)))
            names.append(name)
    return names


def _cases(twin: nn.Module, stored: FloatFormat) -> list[Tensor]:
    """Inputs of several shapes, each with rows of all scales and both signs."""
    weight: Tensor = getattr(twin, WEIGHT)
    generator = torch.Generator().manual_seed(0)
    if stored.operation == "lookup":
        ids = torch.randint(len(weight), (3, 4), generator=generator, device="cpu")
        ids = ids.to(weight.device)
        return [ids, ids[0]]
    if stored.operation == "convolution":
        conv = cast(nn.Conv1d, twin)
        reach = [d * (k - 1) + 1 + 2 * s for k, d, s in
                 zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)]  # fmt: skip
        shape = (len(SCALES), conv.in_channels, *reach)
    else:
        shape = (2 * len(SCALES), stored.shape(twin)[1])
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    scales = SCALES if weight.dtype.itemsize >= 4 else (1e-2, 1.0, 1.0)  # 16 bits overflow
    for first, scale in enumerate(scales):
        x[first :: len(scales)] *= scale
    x = x.to(weight.device, weight.dtype)
    return [x, x[0]] if stored.operation == "convolution" else [x, x.view(2, len(SCALES), -1)]


def _product(twin: nn.Module, x: Tensor, stored: FloatFormat) -> Tensor:
    weight, bias = getattr(twin, WEIGHT), getattr(twin, "bias", None)
    if stored.operation == "lookup":
        return functional.embedding(x, weight)
    if stored.operation == "convolution":
        return convolve(twin, x, weight, bias)
    return functional.linear(x, stored.orient(weight), bias)


def _errors(twin: nn.Module, function: Callable, stored: FloatFormat) -> list[float]:
    """The largest error of each case, in units of the rounding tolerance."""
    weight: Tensor = getattr(twin, WEIGHT)
    tolerance = TOLERANCES.get(weight.dtype, 4 * torch.finfo(weight.dtype).eps)
    bias = getattr(twin, "bias", None)
    is_lookup, rows = stored.operation == "lookup", stored.orient(weight).float()
    size = rows.norm() if is_lookup else rows.norm(dim=1).amax()
    errors = []
    for x in _cases(twin, stored):
        wanted, found = _product(twin, x, stored), _called(function, x)
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise TypeError(
                f"it returns {found.dtype} of shape {tuple(found.shape)}, not {wanted.dtype} of "
                f"shape {tuple(wanted.shape)}"
            )
        norms = size if is_lookup else size * _input_norms(twin, x, stored)
        if bias is not None:
            norms = norms + bias.abs().amax()
        difference = (found - wanted).abs().nan_to_num(nan=torch.inf) / (norms * tolerance + 1e-30)
        errors.append(float(difference.amax()))
    return errors


def _relative_errors(twin: nn.Module, function: Callable, stored: FloatFormat) -> list[float]:
    """The error at each scale of the inputs, relative to the norm of the outputs."""
    rows = _cases(twin, stored)[:1]
    if stored.operation != "lookup":
        # Both signs of each row, because a gate opens for only one of them.
        rows = [rows[0][first :: len(SCALES)] for first in range(len(SCALES))]
        rows = [torch.cat([part, -part]) for part in rows]
    errors = []
    for part in rows:
        found, wanted = _called(function, part), _product(twin, part, stored)
        errors.append(float((found - wanted).norm() / wanted.norm().clamp_min(1e-30)))
    return errors


def _called(function: Callable, x: Tensor) -> Tensor:
    found = function(x)
    if not isinstance(found, Tensor):
        raise TypeError(f"it returns a {type(found).__name__}, not a tensor")
    return found


def _input_norms(twin: nn.Module, x: Tensor, stored: FloatFormat) -> Tensor:
    """‖x‖ of the input of each output, in a shape that broadcasts over the outputs."""
    features = getattr(twin, WEIGHT).ndim - 1 if stored.operation == "convolution" else 1
    return torch.linalg.vector_norm(x.float(), dim=tuple(range(-features, 0)), keepdim=True)
