"""Block quantizers, for methods such as LoftQ that replace the base weight."""

from lora_init.quantization.codebooks import NF4_TABLE, normal_float_table
from lora_init.quantization.quantizer import NestedScale, Quantized, Quantizer

__all__ = ["NF4_TABLE", "NestedScale", "Quantized", "Quantizer", "normal_float_table"]
