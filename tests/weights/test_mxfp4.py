"""MXFP4 codes are read as transformers reads those of gpt-oss."""

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lora_init.weights.mxfp4 import mxfp4_values


def test_blocks_are_read_as_by_transformers():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (2, 6, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, (2, 6, 4), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(codes, scales, dtype=torch.float32)
    assert torch.equal(mxfp4_values(codes, scales), expected.transpose(1, 2))
    assert mxfp4_values(codes, scales).shape == (2, 6, 128)


def test_a_value_is_its_code_times_a_power_of_two():
    codes = torch.tensor([[[0x21, 0xF7]]], dtype=torch.uint8)
    scales = torch.tensor([[128]], dtype=torch.uint8)
    assert mxfp4_values(codes, scales).tolist() == [[1.0, 2.0, 12.0, -12.0]]
