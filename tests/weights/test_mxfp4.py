"""MXFP4 codes are read as transformers reads those of gpt-oss."""

import pytest
import torch
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, convert_moe_packed_tensors

from lora_init import LoraConfig, get_peft_model
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


class Block(torch.nn.Module):
    """A router's layer and packed experts, as transformers loads a gpt-oss checkpoint."""

    def __init__(self, is_swizzled):
        super().__init__()
        self.experts = Mxfp4GptOssExperts(GptOssConfig(num_local_experts=2, hidden_size=64))
        self.gate = torch.nn.Linear(64, 2)
        if is_swizzled:  # the kernels' tensors are not parameters
            del self.experts.gate_up_proj, self.experts.down_proj
            self.experts.gate_up_proj = self.experts.down_proj = object()


@pytest.mark.parametrize("is_swizzled", [False, True])
def test_packed_experts_are_refused_with_the_fix(is_swizzled):
    base, fix = Block(is_swizzled), r"triton.*Mxfp4Config\(dequantize=True\), or .*on the meta"
    with pytest.raises(TypeError, match=f"experts.down_proj' is a Mxfp4GptOssExperts.*{fix}"):
        get_peft_model(base, LoraConfig(r=2, target_parameters=["experts.down_proj"]))
    plan = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"), dry_run=True)
    reasons = {one.name: one.reason for one in plan.left_out}
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert "dequantize=True" in reasons[name]
