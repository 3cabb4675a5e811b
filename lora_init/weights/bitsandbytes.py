"""bitsandbytes' packed linear modules: all that the package knows about how they store a weight.

| module | codes | scales | values |
|---|---|---|---|
| Linear4bit | two to a byte | one per block, or 8-bit codes ("double") | table[code] · scale |
| Linear8bitLt | int8 | one per row | code · scale / 127 |

Values are float32 products of codes and scales, whatever the module's compute dtype: it is the
forward pass that rounds them to the compute dtype, not the storage.

On a CPU with AVX512-BF16 an evaluation forward of Linear4bit repacks the weight in place: the codes
change their order, and the scales are **rounded to bfloat16** (a relative 2^-9, doubled statistics
are expanded first). The module then computes with the rounded scales, also in training, so they are
what `dequantized` reads; only `held`, taken before, still knows the exact ones. The repacked module
has two faults of its own (version 0.50.2), which `keep_plain` prevents:
    - its forward has no derivative with respect to its input: nothing before it learns;
    - `state_dict` turns the codes back but, without double quantisation, not the order of the
      scales: what is saved, and computed from then on, is wrong. It is read right here.

Deviations:
    - Where rows are no multiple of the block size, blocks run on into the next row. bitsandbytes on
      a CPU with AVX512 restarts them at each row when it dequantises, so its training forward is
      wrong there; its evaluation forward fails. `dequantized` gives the values that were stored.
    - `requantize` computes codes and scales in float32 by our `Quantizer`, on every device. For
      Linear4bit on a CPU they are bitsandbytes' own, to the bit (double quantization: to the
      rounding of a mean). Linear8bitLt's `.to` would round the weight to float16 first; we do not.
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

ROWS = 32  # that bitsandbytes' repacking for CPUs interleaves


@dataclass(frozen=True)
class Held:
    """A packed weight exactly as it was when `held` was called.

    References, no copies: bitsandbytes exchanges the memory behind the parameter and the fields of
    its state, so both are remembered next to it.
    """

    parameter: nn.Parameter
    data: Tensor
    state: Any
    repacks: bool


def is_packed(module: nn.Module) -> bool:
    """Whether `module` is one of bitsandbytes' linear modules: by class name, never by dtype."""
    return _is_4bit(module) or _is_8bit(module)


def is_quantized(module: nn.Module) -> bool:
    """Whether a packed module's weight is quantised: a new head's may not be yet."""
    if _is_8bit(module):
        return module.weight.dtype == torch.int8
    return _is_4bit(module) and getattr(module.weight, "quant_state", None) is not None


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)``, without touching the data."""
    return module.out_features, module.in_features


def dequantized(module: nn.Module) -> Float[Tensor, "out in"]:
    """The values that the module's codes stand for, in float32 and on its device.

    Raises:
        TypeError: `module` is not packed.
        ValueError: its weight is not quantised (yet).
    """
    quantizer = quantizer_of(module)
    codes, scale = _int8_state(module) if _is_8bit(module) else _codes_and_scale(module)
    return quantizer.dequantize(Quantized(codes.reshape(weight_shape(module)), scale, quantizer))


def quantizer_of(module: nn.Module) -> Quantizer:
    """The plain-torch map for which ``roundtrip(w)`` equals `dequantized` after `requantize`.

    Raises:
        TypeError: `module` is not packed.
        ValueError: its weight is not quantised (yet).
    """
    if _is_8bit(module):
        _int8_state(module)
        return Quantizer("int8", 8)
    state = _quant_state(module)
    return Quantizer(state.quant_type, 4, state.blocksize, _original(state, "nested"))


def float_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that the weight had before it was quantized.

    Linear8bitLt does not record it: that of its bias stands for it, else float16, which
    bitsandbytes quantizes from.
    """
    if not _is_8bit(module):
        return _original(_quant_state(module), "dtype")
    return torch.float16 if module.bias is None else module.bias.dtype


def parameter_count(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: 4-bit codes lie two in a byte of their storage."""
    if type(parameter).__name__ == "Params4bit":
        return 2 * parameter.element_size() * parameter.numel()
    return parameter.numel()


def description(module: nn.Module) -> str:
    """What the weight is quantised to: "nf4/64 double", "fp4/64", "int8"."""
    return quantizer_of(module).name.replace("+", " ")


@torch.no_grad()
def requantize(module: nn.Module, weight: Float[Tensor, "out in"]) -> None:
    """Put a new weight into the module, quantised with the module's own settings.

    The module gets a new parameter; the old one stays as it is, so that `put_back` can restore it.

    Args:
        weight: (out, in), any float dtype and device.

    Raises:
        TypeError: `module` is not packed.
        ValueError: its weight is not quantised (yet), or `weight` has another shape.
    """
    quantizer = quantizer_of(module)
    if tuple(weight.shape) != weight_shape(module):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; this {type(module).__name__} takes "
            f"{weight_shape(module)}, (out, in)."
        )
    quantized = quantizer.quantize(weight.to(module.weight.device))
    if _is_8bit(module):
        from bitsandbytes.nn import Int8Params

        codes, scale = quantized.codes, quantized.scale
        module.weight = Int8Params(codes, requires_grad=False, CB=codes, SCB=scale)
        # The next forward moves CB and SCB here from the weight.
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
    """Remember the packed weight as it is, for `put_back`. Writing into its memory, as
    ``load_state_dict`` does, changes what is held; forwards, repacking and `requantize` do not.

    Raises:
        TypeError: `module` is not packed.
        ValueError: its weight is not quantised (yet).
    """
    weight = module.weight
    if _is_8bit(module):
        _int8_state(module)
        state = (weight.CB, weight.SCB, module.state.CB, module.state.SCB)
        return Held(weight, weight.data, state, False)
    return Held(weight, weight.data, _copied(_quant_state(module)), _repacks(module))


def put_back(module: nn.Module, held: Held) -> None:
    """Restore the weight that was held: the same outputs, to the bit, and the same state dict.

    A model that has moved since gets it on its new device.
    """
    parameter, device = held.parameter, module.weight.device
    parameter.data = held.data.to(device)
    module.weight = parameter
    if _is_8bit(module):
        moved = [_moved(value, held.data, parameter.data) for value in held.state]
        parameter.CB, parameter.SCB, module.state.CB, module.state.SCB = moved
        return
    # A copy, because the next forward may rewrite it and `held` may be put back again.
    state = _copied(held.state)
    state.to(device)
    parameter.quant_state = module.quant_state = state
    module.support_avx512bf16_for_cpu = held.repacks
    if device.type != "cpu" and _is_repacked(state):
        keep_plain(module)  # only a CPU reads that layout


def _moved(value: Tensor | None, codes: Tensor, codes_there: Tensor) -> Tensor | None:
    """A part of an 8-bit state, where its module is now; the codes share the weight's memory."""
    if value is None:
        return None
    return codes_there if value.data_ptr() == codes.data_ptr() else value.to(codes_there.device)


@torch.no_grad()
def keep_plain(module: nn.Module) -> None:
    """Keep bitsandbytes from repacking a Linear4bit for its CPU, and undo it where it has happened.

    A module that learns, or that something before it learns through, needs this: see the faults
    named above. Scales that are already rounded stay so; `put_back` returns to the former habit.
    Linear8bitLt is never repacked and stays as it is.

    Raises:
        TypeError: `module` is not packed.
        ValueError: its weight is not quantised (yet).
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
    # Left expanded: to quantise the scales anew would change them a second time.
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


def _unquantised(module: nn.Module, fix: str) -> ValueError:
    return ValueError(f"This {type(module).__name__} holds no quantised weight; {fix}.")


def _quant_state(module: nn.Module) -> Any:
    """The QuantState of a Linear4bit; under FSDP only the module still has it."""
    if not _is_4bit(module):
        raise TypeError(
            f"{type(module).__name__} is not packed; allowed are bitsandbytes' Linear4bit and "
            "Linear8bitLt."
        )
    weight = module.weight
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None or not getattr(weight, "bnb_quantized", True):
        raise _unquantised(module, 'move it to its device first, as in model.to("cpu")')
    if tuple(state.shape) != weight_shape(module):
        raise ValueError(
            f"This {type(module).__name__} was quantised from a weight of shape "
            f"{tuple(state.shape)}; quantise it from {weight_shape(module)}, (out, in)."
        )
    return state


def _int8_state(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (out,) of a Linear8bitLt, before or after its first forward."""
    weight, state = module.weight, module.state
    if state.has_fp16_weights:
        raise _unquantised(module, "build it with has_fp16_weights=False, then model.to(device)")
    on_weight = getattr(weight, "CB", None) is not None
    codes = weight.CB if on_weight else state.CB if state.CB is not None else weight.data
    scale = weight.SCB if on_weight else state.SCB
    if codes.dtype != torch.int8 or scale is None:
        raise _unquantised(module, 'move it to its device first, as in model.to("cpu")')
    return codes, scale


def _is_repacked(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _original(state: Any, name: str) -> Any:
    """A field as it was before bitsandbytes repacked, which leaves the old one as "original"."""
    return getattr(state, f"original_{name}", getattr(state, name))


def _repacks(module: nn.Module) -> bool:
    return bool(getattr(module, "support_avx512bf16_for_cpu", False))


def _storage(module: nn.Module) -> torch.dtype:
    """The dtype that the codes are viewed as; repacked, they are bytes."""
    return getattr(_quant_state(module), "original_storage_type", module.weight.dtype)


def _copied(state: Any) -> Any:
    """A QuantState of its own on the same tensors: bitsandbytes rebinds fields, on both levels."""
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
        # (rows/32, columns/2) groups of 32 bytes: the low halves hold pairs of the first 16 rows.
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
    # Two dimensions, (blocks of a row, rows): repacked, or half turned back by `state_dict`.
    return codes, (state.absmax.T if state.absmax.ndim == 2 else state.absmax).reshape(-1).float()


def _pack(codes: Tensor, kind: str, storage: torch.dtype) -> Tensor:
    """Two codes to a byte, the first one high, as a column of `storage`."""
    codes = codes.reshape(-1)
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), 7 if kind == "nf4" else 0)])  # a zero
    return (codes[::2] << 4 | codes[1::2]).view(storage).unsqueeze(1)
