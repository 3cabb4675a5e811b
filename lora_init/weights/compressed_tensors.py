"""Weights that compressed-tensors has compressed: packed integers, int8 or float8, with scales.

compressed-tensors decompresses a whole model in its first forward pass. Its layers are then plain
ones, whose forward may quantize the inputs; the format Linear supports these too.

Source: the library's compressors, which decompress each layer without changing it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.weights.format import Finding, register_weight_format
from lora_init.weights.read_only import ReadOnlyFormat


class CompressedTensorsFormat(ReadOnlyFormat):
    """nn.Linear with a `quantization_scheme` and the status "compressed"."""

    name = "compressed-tensors"

    def matches(self, module: nn.Module) -> bool:
        status = getattr(module, "quantization_status", None)
        is_compressed = getattr(status, "value", None) == "compressed"
        return is_compressed and isinstance(module, nn.Linear)

    def blocks_gradient(self, module: nn.Module) -> bool:
        return _scheme(module).input_activations is not None

    def replaced_forward(self, module: nn.Module) -> Finding | None:
        return Finding("it quantizes its inputs", True) if self.blocks_gradient(module) else None

    def values(self, module: nn.Module) -> Float[Tensor, "out in"]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.format import infer_module_format

        scheme = _scheme(module)
        kind = scheme.format or infer_module_format(type(module), scheme)
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        state: dict[str, Tensor | None] = {name: tensor.data for name, tensor in own}
        compressor = BaseCompressor.get_value_from_registry(getattr(kind, "value", kind))
        return cast(Tensor, compressor.decompress(state, scheme)["weight"])

    def float_dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of the scales, or bfloat16 if these are exponents."""
        dtype = cast(Tensor, module.weight_scale).dtype
        return dtype if dtype.is_floating_point else torch.bfloat16

    def describe(self, module: nn.Module) -> str:
        weights = _scheme(module).weights
        size = f"/{weights.group_size}" if weights.group_size else ""
        dynamic = " dynamic" if self.blocks_gradient(module) else ""
        kind = getattr(weights.type, "value", weights.type)
        return f"compressed-tensors {kind}{weights.num_bits}{size}{dynamic}"


register_weight_format(CompressedTensorsFormat())


def _scheme(module: nn.Module) -> Any:
    return module.quantization_scheme
