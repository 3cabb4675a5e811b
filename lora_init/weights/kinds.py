"""The supported module types and how each stores its weight.

The rest of the package sees weights as ``(out, in)``:

| type | stored as | seen as |
|---|---|---|
| Linear | (out, in) | itself |
| Conv1D (transformers) | (in, out) | its transpose |
| Embedding | (entries, width) | its transpose: out = width, in = entries, for one-hot inputs |
| Conv2d, one group | (out, channels, height, width) | (out, channels·height·width), for patches |
| Linear4bit, Linear8bitLt | packed codes and scales | the dequantized matrix, float32 |
"""

from __future__ import annotations

import math
import weakref

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_init.weights import bitsandbytes
from lora_init.weights.offload import HOOK_ATTRIBUTES
from lora_init.weights.probe import Finding, probe

TRANSPOSED_TYPES = ("Conv1D", "Embedding")

# Their forwards read codes. They are recognized by class name, never by dtype.
QUANTIZED_CLASSES = {"Linear4bit", "Linear8bitLt", "QuantLinear", "WQLinear_GEMM", "AqlmLinear"}


def class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


_FLOAT_CLASSES = (("Linear", nn.Linear), ("Conv2d", nn.Conv2d), ("Embedding", nn.Embedding))

# Probing runs the module and `module_type` is called often, so cache one probe per module.
_FINDINGS: weakref.WeakKeyDictionary[nn.Module, Finding] = weakref.WeakKeyDictionary()
_LINEAR_CLASSES: weakref.WeakSet[type] = weakref.WeakSet()


def module_type(module: nn.Module) -> str:
    """The module's type as in the registry (`MODULE_TYPES`), or else its class name.

    The class decides, never the dtype. A subclass with a custom forward is accepted if a probe
    shows that it computes the same function (see `lora_init.weights.probe`). transformers' scaled
    word embeddings are accepted too: the adapted layer multiplies by `embed_scale` as they do.
    """
    if bitsandbytes.is_packed(module):
        return "Linear4bit" if "Linear4bit" in class_names(module) else "Linear8bitLt"
    kind, has_own_forward = _derived_type(module)
    if kind is None or (has_own_forward and refusal(module) is not None):
        return type(module).__name__
    return kind


def refusal(module: nn.Module) -> str | None:
    """Why a subclass of a supported type cannot be adapted; None if it can, or for other types.

    The text completes messages such as "a GatedLinear, which is not supported: ...".
    """
    kind, has_own_forward = _derived_type(module)
    if kind is None or not has_own_forward:
        return None
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return "it does not store its weight as a floating-point parameter `weight`"
    if weight.is_meta:
        if type(module) in _LINEAR_CLASSES:  # already probed on a module with a loaded weight
            return None
        return (
            "it has its own forward, and its weight is on the meta device: whether it computes a "
            "product with its weight cannot be probed"
        )
    if type(weight.data).__name__ not in ("Tensor", "Parameter"):
        return f"it has its own forward, and its weight is a {type(weight.data).__name__}"
    if module not in _FINDINGS:
        _FINDINGS[module] = probe(module, kind)
        if _FINDINGS[module].reason is None:
            _LINEAR_CLASSES.add(type(module))
    reason = _FINDINGS[module].reason
    return None if reason is None else f"it has its own forward, and {reason}"


def replaced_forward(module: nn.Module) -> Finding | None:
    """Probe a forward that was set on the instance; None if there is none.

    Quantizers set one to round inputs or weights. The wrapper of Accelerate's hooks does not count,
    because it calls the class's forward.
    """
    if "forward" not in vars(module) or bitsandbytes.is_packed(module):
        return None
    kind, _ = _derived_type(module)
    if kind is None or module.weight.is_meta:
        return None
    if hasattr(module, HOOK_ATTRIBUTES[0]):
        inner = vars(module).get(HOOK_ATTRIBUTES[1])
        if getattr(inner, "__func__", None) is type(module).forward:
            return None
        return Finding("a forward under Accelerate's hook was set on the instance", False)
    return probe(module, kind)


def _derived_type(module: nn.Module) -> tuple[str | None, bool]:
    """The float type that the module's class derives from, and whether its forward differs."""
    names = class_names(module)
    if names & QUANTIZED_CLASSES:
        return None, False
    for name, cls in _FLOAT_CLASSES:
        if isinstance(module, cls):
            has_own = type(module).forward is not cls.forward
            is_scaled = name == "Embedding" and embedding_scale(module) is not None
            return name, has_own and not is_scaled
    for cls in type(module).__mro__:
        if cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers"):
            return "Conv1D", type(module).forward is not cls.forward
    return None, False


def embedding_scale(module: nn.Embedding) -> float | Tensor | None:
    """The factor that scales the rows of a scaled word embedding; None for a plain embedding."""
    scaled = type(module).__name__.endswith("ScaledWordEmbedding")
    return getattr(module, "embed_scale", None) if scaled else None


def oriented_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """The weight as ``(out, in)``.

    Float modules return a view of their storage in their dtype, packed modules a dequantized copy.
    """
    if bitsandbytes.is_packed(module):
        return bitsandbytes.dequantized(module)
    return orient(module_type(module), module.weight.detach())


def orient(kind: str, weight: Tensor) -> Float[Tensor, "out in"]:
    """View a weight, stored as in a module of type `kind`, as ``(out, in)``."""
    if kind in TRANSPOSED_TYPES:
        return weight.T
    return weight.flatten(1) if kind == "Conv2d" else weight


def stored_weight(module: nn.Module, weight: Float[Tensor, "out in"]) -> Tensor:
    """Invert `oriented_weight` for float modules: convert to the module's layout."""
    kind = module_type(module)
    if kind in TRANSPOSED_TYPES:
        return weight.T
    return weight.reshape(module.weight.shape) if kind == "Conv2d" else weight


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` without reading the data, so it works on the meta device too."""
    if bitsandbytes.is_packed(module):
        return bitsandbytes.weight_shape(module)
    rows, *columns = module.weight.shape
    if module_type(module) in TRANSPOSED_TYPES:
        return columns[0], rows
    return rows, math.prod(columns)


def input_rows(module: nn.Module, x: Tensor) -> Float[Tensor, "positions in"]:
    """The vectors that the (out, in) weight is multiplied by: tokens, or image patches."""
    if module_type(module) != "Conv2d":
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    if padded.ndim == 3:
        padded = padded[None]
    patches = functional.unfold(
        padded, module.kernel_size, dilation=module.dilation, stride=module.stride
    )
    return patches.transpose(1, 2).flatten(0, 1)


def reading(module: nn.Module) -> tuple | None:
    """A key for how `input_rows` cuts an input. Modules with equal keys read the same rows."""
    if module_type(module) != "Conv2d":
        return None
    return (
        module.kernel_size, module.stride, str(module.padding), module.dilation, module.padding_mode
    )  # fmt: skip


def weight_description(module: nn.Module) -> str:
    """The weight's dtype, or the format of a packed weight, e.g. "nf4/64"."""
    if bitsandbytes.is_packed(module):
        return bitsandbytes.description(module)
    return str(module.weight.dtype).removeprefix("torch.")
