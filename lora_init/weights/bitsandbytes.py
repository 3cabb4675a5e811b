"""bitsandbytes' packed linear modules: how they store, dequantize and repack their weights.

| module | codes | scales | values |
|---|---|---|---|
| Linear4bit | two per byte | one per block, or 8-bit codes ("double") | table[code] · scale |
| Linear8bitLt | int8 | one per row | code · scale / 127 |

Values are float32 products of codes and scales, whatever the module's compute dtype. Only the
forward pass rounds them to the compute dtype.

On a CPU with AVX512-BF16 an eval forward of Linear4bit repacks the weight in place. It reorders the
codes and **rounds the scales to bfloat16** (a relative error of 2^-9; double-quantized scales are
expanded first). The module computes with the rounded scales from then on, also in training, so
`dequantized` reads them. Only a `held` taken before the forward has the exact scales. Repacking
has two bugs (bitsandbytes 0.50.2), which `keep_plain` prevents:
    - The forward has no derivative with respect to its input, so earlier layers do not train.
    - `state_dict` restores the order of the codes but, without double quantization, not that of the
      scales. The saved weights are wrong, and so are later outputs. This module reads them
      correctly.

Deviations:
    - If rows are not a multiple of the block size, blocks continue in the next row. On a CPU with
      AVX512, bitsandbytes restarts blocks at each row when it dequantizes. Its training forward is
      then wrong and its eval forward fails. `dequantized` returns the values that were stored.
    - `requantize` computes codes and scales in float32 with `Quantizer`, on every device. For
      Linear4bit they equal bitsandbytes' CPU results bit by bit (with double quantization: up to
      the rounding of a mean). Linear8bitLt's `.to` rounds the weight to float16 first; this code
      does not.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.quantization.codebooks import dynamic_table
from lora_init.quantization.quantizer import DOUBLE_BLOCK, Quantized, Quantizer, expanded

ROWS = 32  # number of rows that bitsandbytes' CPU repacking interleaves


@dataclass(frozen=True)
class Held:
    """The state of a packed weight when `held` was called.

    It holds references, not copies. bitsandbytes replaces the memory of the parameter and the
    fields of its quant state, so both are recorded separately.
    """

    parameter: nn.Parameter
    data: Tensor
    state: Any
    repacks: bool


def is_packed(module: nn.Module) -> bool:
    """Whether `module` is one of bitsandbytes' linear modules, decided by class name."""
    return _is_4bit(module) or _is_8bit(module)


def is_quantized(module: nn.Module) -> bool:
    """Whether a packed module's weight is quantized already; a new head's may not be."""
    if _is_8bit(module):
        return module.weight.dtype == torch.int8
    return _is_4bit(module) and getattr(module.weight, "quant_state", None) is not None


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)``, without reading the data."""
    return module.out_features, module.in_features


def dequantized(module: nn.Module) -> Float[Tensor, "out in"]:
    """The dequantized weight, in float32 and on the module's device.

    Raises:
        TypeError: `module` is not packed.
        ValueError: its weight is not quantized (yet).
    """
    quantizer = quantizer_of(module)
    codes, scale = _int8_state(module) if _is_8bit(module) else _codes_and_scale(module)
    return quantizer.dequantize(Quantized(codes.reshape(weight_shape(module)), scale, quantizer))


def quantizer_of(module: nn.Module) -> Quantizer:
    """The quantizer whose ``roundtrip(w)`` equals `dequantized` after `requantize`.

    Raises:
        TypeError: `module` is not packed.
        ValueError: its weight is not quantized (yet).
    """
    if _is_8bit(module):
        _int8_state(module)
        return Quantizer("int8", 8)
    state = _quant_state(module)
    return Quantizer(state.quant_type, 4, state.blocksize, _original(state, "nested"))


def float_dtype(module: nn.Module) -> torch.dtype:
    """The weight's dtype before it was quantized.

    Linear8bitLt does not record it. The dtype of its bias is returned instead, or float16, which
    bitsandbytes quantizes from.
    """
    if not _is_8bit(module):
        return _original(_quant_state(module), "dtype")
    return torch.float16 if module.bias is None else module.bias.dtype


def parameter_count(parameter: Tensor) -> int:
    """The number of weights in a parameter. 4-bit storage holds two codes per byte."""
    if type(parameter).__name__ == "Params4bit":
        return 2 * parameter.element_size() * parameter.numel()
    return parameter.numel()


def description(module: nn.Module) -> str:
    """The format of the quantized weight: "nf4/64 double", "fp4/64", "int8"."""
    return quantizer_of(module).name.replace("+", " ")


@torch.no_grad()
def requantize(module: nn.Module, weight: Float[Tensor, "out in"]) -> None:
    """Quantize a new weight with the module's settings and store it in the module.

    The module gets a new parameter. The old one is unchanged, so that `put_back` can restore it.

    Args:
        weight: (out, in), any float dtype and device.

    Raises:
        TypeError: `module` is not packed.
        ValueError: its weight is not quantized (yet), or `weight` has another shape.
    """
    quantizer = quantizer_of(module)
    if tuple(weight.shape) != weight_shape(module):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but this {type(module).__name__} needs "
            f"{weight_shape(module)}, (out, in)."
        )
    quantized = quantizer.quantize(weight.to(module.weight.device))
    if _is_8bit(module):
        from bitsandbytes.nn import Int8Params

        codes, scale = quantized.codes, quantized.scale
        module.weight = Int8Params(codes, requires_grad=False, CB=codes, SCB=scale)
        # The next forward moves CB and SCB from the weight to the state.
        module.state.CB = module.state.SCB = None
        return

    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    old = _quant_state(module)
    double = {}
    if quantized.nested is not None:
        table = dynamic_table().to(quantized.scale.device, copy=True)
        inner = QuantState(
            quantized.nested.scale, code=table, blocksize=DOUBLE_BLOCK, dtype=torch.float32
        )
        double = {"offset": quantized.nested.offset, "state2": inner}
    state = QuantState(
        quantized.scale if quantized.nested is None else quantized.nested.codes,
        shape=torch.Size(weight_shape(module)),
        code=old.code,
        blocksize=old.blocksize,
        quant_type=old.quant_type,
        dtype=_original(old, "dtype"),
        **double,
    )
    storage = _storage(module)
    module.weight = Params4bit(
        _pack(quantized.codes, quantizer.kind, storage),
        requires_grad=False,
        quant_state=state,
        blocksize=old.blocksize,
        compress_statistics=quantizer.double,
        quant_type=old.quant_type,
        quant_storage=storage,
        bnb_quantized=True,
    )
    module.quant_state = state


def held(module: nn.Module) -> Held:
    """Record the packed weight for `put_back`.

    In-place writes, such as those of ``load_state_dict``, change the record. Forward passes,
    repacking and `requantize` do not.

    Raises:
        TypeError: `module` is not packed.
        ValueError: its weight is not quantized (yet).
    """
    weight = module.weight
    if _is_8bit(module):
        _int8_state(module)
        state = (weight.CB, weight.SCB, module.state.CB, module.state.SCB)
        return Held(weight, weight.data, state, False)
    return Held(weight, weight.data, _copied(_quant_state(module)), _repacks(module))


def put_back(module: nn.Module, held: Held) -> None:
    """Restore a recorded weight, with bit-identical outputs and state dict.

    If the model has moved since, the weight moves to the new device.
    """
    parameter, device = held.parameter, module.weight.device
    parameter.data = held.data.to(device)
    module.weight = parameter
    if _is_8bit(module):
        moved = [_moved(value, held.data, parameter.data) for value in held.state]
        parameter.CB, parameter.SCB, module.state.CB, module.state.SCB = moved
        return
    # Copy the state, because the next forward may modify it, and `held` may be used again.
    state = _copied(held.state)
    state.to(device)
    parameter.quant_state = module.quant_state = state
    module.support_avx512bf16_for_cpu = held.repacks
    if device.type != "cpu" and _is_repacked(state):
        keep_plain(module)  # the repacked layout works on a CPU only


def _moved(value: Tensor | None, codes: Tensor, codes_there: Tensor) -> Tensor | None:
    """Move part of an 8-bit state to the module's device; codes share the weight's memory."""
    if value is None:
        return None
    return codes_there if value.data_ptr() == codes.data_ptr() else value.to(codes_there.device)


@torch.no_grad()
def keep_plain(module: nn.Module) -> None:
    """Prevent CPU repacking of a Linear4bit, and undo it if it has happened.

    Modules that train need this, and modules through which gradients flow: see the bugs described
    above. Scales that are rounded already stay rounded. `put_back` restores the default behavior.
    Linear8bitLt is never repacked and stays unchanged.

    Raises:
        TypeError: `module` is not packed.
        ValueError: its weight is not quantized (yet).
    """
    if _is_8bit(module):
        return
    state = _quant_state(module)
    module.support_avx512bf16_for_cpu = False
    if not _is_repacked(state) and state.absmax.ndim == 1:
        return
    codes, scale = _codes_and_scale(module)
    plain = _copied(state)
    plain.absmax, plain.dtype = scale, _original(state, "dtype")
    # Keep the scales expanded: quantizing them again would change them again.
    plain.nested, plain.state2, plain.offset = False, None, None
    plain.packing_format_for_cpu = False
    module.weight.data = _pack(codes, state.quant_type, _storage(module))
    module.weight.quant_state = module.quant_state = plain


def _names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _is_4bit(module: nn.Module) -> bool:
    return "Linear4bit" in _names(module)


def _is_8bit(module: nn.Module) -> bool:
    return "Linear8bitLt" in _names(module)


def _unquantized(module: nn.Module, fix: str) -> ValueError:
    return ValueError(f"This {type(module).__name__} holds no quantized weight; {fix}.")


def _quant_state(module: nn.Module) -> Any:
    """The QuantState of a Linear4bit. Under FSDP only the module holds it."""
    if not _is_4bit(module):
        raise TypeError(
            f"{type(module).__name__} is not packed; it must be bitsandbytes' Linear4bit or "
            "Linear8bitLt."
        )
    weight = module.weight
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None or not getattr(weight, "bnb_quantized", True):
        raise _unquantized(module, 'move it to its device first, as in model.to("cpu")')
    if tuple(state.shape) != weight_shape(module):
        raise ValueError(
            f"This {type(module).__name__} was quantized from a weight of shape "
            f"{tuple(state.shape)}; quantize it from {weight_shape(module)}, (out, in)."
        )
    return state


def _int8_state(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (out,) of a Linear8bitLt, before or after its first forward."""
    weight, state = module.weight, module.state
    if state.has_fp16_weights:
        raise _unquantized(module, "build it with has_fp16_weights=False, then model.to(device)")
    on_weight = getattr(weight, "CB", None) is not None
    codes = weight.CB if on_weight else state.CB if state.CB is not None else weight.data
    scale = weight.SCB if on_weight else state.SCB
    if codes.dtype != torch.int8 or scale is None:
        raise _unquantized(module, 'move it to its device first, as in model.to("cpu")')
    return codes, scale


def _is_repacked(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _original(state: Any, name: str) -> Any:
    """A field's value before repacking, which bitsandbytes keeps under the prefix "original"."""
    return getattr(state, f"original_{name}", getattr(state, name))


def _repacks(module: nn.Module) -> bool:
    return bool(getattr(module, "support_avx512bf16_for_cpu", False))


def _storage(module: nn.Module) -> torch.dtype:
    """The dtype in which the codes are stored; repacked codes are bytes."""
    return getattr(_quant_state(module), "original_storage_type", module.weight.dtype)


def _copied(state: Any) -> Any:
    """Copy a QuantState, sharing its tensors. bitsandbytes rebinds fields on both levels."""
    state = copy.copy(state)
    if state.nested:
        state.state2 = copy.copy(state.state2)
    return state


def _codes_and_scale(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Codes (out · in,) as uint8 and scales (blocks,) as float32 of a Linear4bit, in any layout."""
    state = _quant_state(module)
    rows, columns = weight_shape(module)
    data = module.weight.data.contiguous().view(torch.uint8).reshape(-1)
    if _is_repacked(state):
        # (rows/32, columns/2) groups of 32 bytes: low nibbles hold pairs of the first 16 rows.
        groups = data.reshape(-1, ROWS)
        codes = torch.cat([groups & 15, groups >> 4], dim=1)
        codes = codes.reshape(rows // ROWS, columns // 2, ROWS, 2).transpose(1, 2).reshape(-1)
    else:
        codes = torch.stack([data >> 4, data & 15], dim=1).reshape(-1)[: rows * columns]
    if state.nested:
        scale = expanded(
            state.absmax, state.state2.absmax, state.state2.code, state.state2.blocksize
        )
        return codes, scale + state.offset
    # Two dimensions, (blocks of a row, rows): repacked, or only partly restored by `state_dict`.
    return codes, (state.absmax.T if state.absmax.ndim == 2 else state.absmax).reshape(-1).float()


def _pack(codes: Tensor, kind: str, storage: torch.dtype) -> Tensor:
    """Pack two codes per byte, the first in the high nibble, as a column of dtype `storage`."""
    codes = codes.reshape(-1)
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), 7 if kind == "nf4" else 0)])  # a zero
    return (codes[::2] << 4 | codes[1::2]).view(storage).unsqueeze(1)
