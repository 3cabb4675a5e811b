"""Weights of bitsandbytes' Linear4bit: two codes per byte, and one scale per block.

On a CPU with AVX512-BF16 an eval forward of Linear4bit repacks the weight in place. It reorders the
codes and **rounds the scales to bfloat16** (a relative error of 2^-9; double-quantized scales are
expanded first). The module computes with the rounded scales from then on, also in training, so
`read` returns them. Only a `hold` before the forward has the exact scales. Repacking has two bugs
(bitsandbytes 0.50.2), which `keep_plain` prevents:
    - The forward has no derivative with respect to its input, so earlier layers do not train.
    - `state_dict` restores the order of the codes but, without double quantization, not that of the
      scales. The saved weights are wrong, and so are later outputs. This module reads them
      correctly.

Deviations:
    - If rows are not a multiple of the block size, blocks continue in the next row. On a CPU with
      AVX512, bitsandbytes restarts blocks at each row when it dequantizes. Its training forward is
      then wrong and its eval forward fails. `read` returns the values that were stored.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from lora_init.quantization.codebooks import dynamic_table
from lora_init.quantization.quantizer import DOUBLE_BLOCK, Quantized, Quantizer, expanded
from lora_init.weights.bitsandbytes import PackedFormat, bitsandbytes_parameter, unquantized
from lora_init.weights.format import WEIGHT, Held, register_weight_format

ROWS = 32  # number of rows that bitsandbytes' CPU repacking interleaves


class Layer4bit(Protocol):
    """What is used of a layer: bitsandbytes' parameter, its QuantState, and whether it repacks."""

    weight: Any
    quant_state: Any
    support_avx512bf16_for_cpu: bool


class Linear4bitFormat(PackedFormat):
    """Linear4bit and its subclasses LinearNF4 and LinearFP4."""

    name = "Linear4bit"

    def quantizer(self, module: nn.Module) -> Quantizer:
        state = self._quant_state(module)
        return Quantizer(state.quant_type, 4, state.blocksize, _original(state, "nested"))

    def float_dtype(self, module: nn.Module) -> torch.dtype:
        return _original(self._quant_state(module), "dtype")

    def changes_in_forward(self, module: nn.Module) -> bool:
        return getattr(cast(Layer4bit, module).weight, "quant_state", None) is not None

    def hold(self, module: nn.Module, name: str = WEIGHT, *, on_cpu: bool = False) -> Held:
        """Record the weight and its quant state, whose fields bitsandbytes replaces.

        In-place writes, such as those of ``load_state_dict``, change the record. Forward passes,
        repacking and `write` do not.
        """
        repacks = bool(getattr(module, "support_avx512bf16_for_cpu", False))
        weight = cast(Layer4bit, module).weight
        return Held(weight, weight.data, name, (_copied(self._quant_state(module)), repacks))

    def put_back(self, module: nn.Module, held: Held) -> None:
        """Restore a recorded weight, with bit-identical outputs and state dict."""
        layer, parameter = cast(Layer4bit, module), cast(Any, held.parameter)
        device = layer.weight.device
        parameter.data = held.data.to(device)
        layer.weight = parameter
        state, repacks = held.state
        # Copy the state, because the next forward may modify it, and `held` may be used again.
        state = _copied(state)
        state.to(device)
        parameter.quant_state = layer.quant_state = state
        layer.support_avx512bf16_for_cpu = repacks
        if device.type != "cpu" and _is_repacked(state):
            self.keep_plain(module)  # the repacked layout works on a CPU only

    def store(self, module: nn.Module, quantized: Quantized) -> None:
        from bitsandbytes.functional import QuantState

        old, quantizer = self._quant_state(module), quantized.quantizer
        double = {}
        if quantized.nested is not None:
            table = dynamic_table().to(quantized.scale.device, copy=True)
            inner = QuantState(
                quantized.nested.scale, code=table, blocksize=DOUBLE_BLOCK, dtype=torch.float32
            )
            double = {"offset": quantized.nested.offset, "state2": inner}
        state = QuantState(
            quantized.scale if quantized.nested is None else quantized.nested.codes,
            shape=torch.Size(self.shape(module)),
            code=old.code,
            blocksize=old.blocksize,
            quant_type=old.quant_type,
            dtype=_original(old, "dtype"),
            **double,
        )
        storage = self._storage(module)
        layer, parameter = cast(Layer4bit, module), bitsandbytes_parameter("Params4bit")
        layer.weight = parameter(
            _pack(quantized.codes, quantizer.kind, storage),
            requires_grad=False,
            quant_state=state,
            blocksize=old.blocksize,
            compress_statistics=quantizer.double,
            quant_type=old.quant_type,
            quant_storage=storage,
            bnb_quantized=True,
        )
        layer.quant_state = state

    @torch.no_grad()
    def keep_plain(self, module: nn.Module) -> None:
        """Prevent CPU repacking, and undo it if it has happened.

        Modules that train need this, and modules through which gradients flow: see the bugs
        described above. Scales that are rounded already stay rounded. `put_back` restores the
        default behavior.
        """
        layer, state = cast(Layer4bit, module), self._quant_state(module)
        layer.support_avx512bf16_for_cpu = False
        if not _is_repacked(state) and state.absmax.ndim == 1:
            return
        codes, scale = self.codes_and_scale(module)
        plain = _copied(state)
        plain.absmax, plain.dtype = scale, _original(state, "dtype")
        # Keep the scales expanded: quantizing them again would change them again.
        plain.nested, plain.state2, plain.offset = False, None, None
        plain.packing_format_for_cpu = False
        layer.weight.data = _pack(codes, state.quant_type, self._storage(module))
        layer.weight.quant_state = layer.quant_state = plain

    def codes_and_scale(
        self, module: nn.Module
    ) -> tuple[UInt8[Tensor, " weights"], Float[Tensor, " blocks"]]:
        """The flattened codes and the scale of each block, from any layout."""
        state = self._quant_state(module)
        rows, columns = self.shape(module)
        data = cast(Layer4bit, module).weight.data.contiguous().view(torch.uint8).reshape(-1)
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
        # Two dimensions, (blocks of a row, rows): repacked, or partly restored by `state_dict`.
        scale = state.absmax.T if state.absmax.ndim == 2 else state.absmax
        return codes, scale.reshape(-1).float()

    def _quant_state(self, module: nn.Module) -> Any:
        """The QuantState. Under FSDP only the module holds it."""
        weight = cast(Layer4bit, module).weight
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        if state is None or not getattr(weight, "bnb_quantized", True):
            raise unquantized(module)
        if tuple(state.shape) != self.shape(module):
            raise ValueError(
                f"This {type(module).__name__} was quantized from a weight of shape "
                f"{tuple(state.shape)}; quantize it from {self.shape(module)}, (out, in)."
            )
        return state

    def _storage(self, module: nn.Module) -> torch.dtype:
        """The dtype in which the codes are stored; repacked codes are bytes."""
        state = self._quant_state(module)
        return getattr(state, "original_storage_type", cast(Layer4bit, module).weight.dtype)


register_weight_format(Linear4bitFormat())


def _is_repacked(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _original(state: Any, name: str) -> Any:
    """A field's value before repacking, which bitsandbytes keeps under the prefix "original"."""
    return getattr(state, f"original_{name}", getattr(state, name))


def _copied(state: Any) -> Any:
    """Copy a QuantState, sharing its tensors. bitsandbytes rebinds fields on both levels."""
    state = copy.copy(state)
    if state.nested:
        state.state2 = copy.copy(state.state2)
    return state


def _pack(codes: Tensor, kind: str, storage: torch.dtype) -> Tensor:
    """Pack two codes per byte, the first in the high nibble, as a column of dtype `storage`."""
    codes = codes.reshape(-1)
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), 7 if kind == "nf4" else 0)])  # a zero
    return (codes[::2] << 4 | codes[1::2]).view(storage).unsqueeze(1)
