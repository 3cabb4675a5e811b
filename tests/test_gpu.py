"""On a CUDA device: the same adapters as on the CPU, wherever the model lives."""

import pytest
import torch
from torch import nn

from lora_init import LoraConfig, get_peft_model, list_initializers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 160))


def adapted(spec, *, model_on, device):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(200, 96, generator=generator).to(model_on) for _ in range(3)]
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights={"name": spec.name})
    return get_peft_model(
        network().to(model_on), config, calibration=batches, device=device, seed=3
    )


@pytest.mark.parametrize("spec", list_initializers(), ids=lambda spec: spec.name)
@pytest.mark.parametrize(("model_on", "device"), [("cpu", "cuda"), ("cuda", None)])
def test_the_same_product_as_on_the_cpu(spec, model_on, device):
    reference = adapted(spec, model_on="cpu", device=None)
    model = adapted(spec, model_on=model_on, device=device)
    assert {p.device.type for p in model.parameters()} == {model_on}
    for name, layer in model.layers.items():
        expected = reference.layers[name]
        assert layer.rank == expected.rank
        product = layer.initial_product().cpu()
        error = torch.linalg.matrix_norm(product - expected.initial_product())
        # EVA's and kaiming's product is zero: there the factors themselves are compared.
        scale = torch.linalg.matrix_norm(expected.original_weight() if spec.base != "replace"
                                         else expected.base_layer.weight.detach())  # fmt: skip
        assert error <= 1e-5 * scale
        if spec.base == "keep":
            torch.testing.assert_close(
                layer.lora_A.detach().cpu(), expected.lora_A.detach(), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_is_preserved_on_the_device(dtype):
    base = network().to("cuda", dtype)
    x = torch.randn(10, 96, device="cuda", dtype=dtype)
    expected = base(x)
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights="pissa")
    gap = (get_peft_model(base, config)(x) - expected).norm() / expected.norm()
    assert gap <= max(2e-6, torch.finfo(dtype).eps)
