"""Supported module types and the one place that knows how each stores its weight.

Everything else in the package sees weights as ``(out, in)``.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

QUANTIZED_CLASSES = {"Linear4bit", "Linear8bitLt", "QuantLinear", "WQLinear_GEMM", "AqlmLinear"}


def class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def module_type(module: nn.Module) -> str:
    """Name the module's type as the registry spells it: "Linear", "Conv1D", else its class name.

    Decided by class, never by dtype. A subclass of nn.Linear counts as one only if it inherits its
    forward: `bitsandbytes.nn.Linear4bit`, for one, stores packed bytes, and the out_proj of
    nn.MultiheadAttention is read by a fused kernel that would never see an adapter.
    """
    names = class_names(module)
    if names & QUANTIZED_CLASSES or "NonDynamicallyQuantizableLinear" in names:
        return type(module).__name__
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return "Linear"
    if "Conv1D" in names and any(
        c.__module__.startswith("transformers") for c in type(module).__mro__
    ):
        return "Conv1D"
    return type(module).__name__


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored ``(in, out)``, as in GPT-2's Conv1D."""
    return module_type(module) == "Conv1D"


def oriented_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """The weight as ``(out, in)``: a view on the module's own storage and in its own dtype."""
    weight = module.weight.detach()
    return weight.T if is_transposed(module) else weight


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` without touching the data, so that it works on the meta device too."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)
