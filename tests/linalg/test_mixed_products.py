"""Products of 16-bit matrices in 16-bit parts on the simulated device, and their users."""

import copy

import pytest
import torch
from simulated_device import simulated_cuda
from torch import nn

from lora_init import LoraConfig, get_peft_model, linalg
from lora_init.linalg import mixed_products

pytestmark = pytest.mark.sampled(3)

every_narrow_dtype = pytest.mark.parametrize("dtype", mixed_products.SIXTEEN_BITS, ids=str)
NARROW_METHODS = ["pissa", "pissa_niter_4", "olora", "milora"]


def weight_of(rows, columns, dtype, exponent=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, min(rows, columns), generator=generator))[0]
        for n in (rows, columns)
    )
    return ((left * torch.arange(1, min(rows, columns) + 1) ** -exponent) @ right.T).to(dtype)


@every_narrow_dtype
@pytest.mark.parametrize("size", [1.0, 1e-7, 3e5])
@pytest.mark.parametrize("stack", [(), (2,), (2, 3)])
def test_products_are_those_of_float32(dtype, size, stack):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(*stack, 40, 60, generator=generator).to(dtype)
    # Columns of very different size, and entries of very different size in each.
    columns = torch.logspace(0, -6, 8)
    block = size * columns * torch.randn(*stack, 60, 8, generator=generator) ** 5
    other = size * columns * torch.randn(*stack, 40, 8, generator=generator) ** 5
    exact = matrix.double() @ block.double(), matrix.double().mT @ other.double()
    with simulated_cuda():
        there = matrix.cuda()
        assert mixed_products.has_mixed_products(there)
        found = (
            mixed_products.product(there, block.cuda()).cpu(),
            mixed_products.transposed_product(there, other.cuda()).cpu(),
        )
    for actual, expected, given in zip(found, exact, (block, other), strict=True):
        assert actual.dtype == torch.float32
        bound = matrix.double().norm(dim=(-2, -1))[..., None] * given.double().norm(dim=-2)
        assert ((actual - expected).norm(dim=-2) <= 2e-7 * bound).all()


@every_narrow_dtype
def test_a_cpu_multiplies_in_float32(dtype):
    matrix = torch.randn(30, 20).to(dtype)
    assert not mixed_products.has_mixed_products(matrix)
    block = torch.randn(20, 3)
    assert torch.equal(mixed_products.product(matrix, block), matrix.float() @ block)


@every_narrow_dtype
@pytest.mark.parametrize("method", ["exact", "gram", "gram-krylov", "krylov"])
def test_triplets_of_a_16_bit_matrix(dtype, method):
    """They reach the objective of its float32 copy, on a CPU and on the simulated device."""
    matrix = weight_of(320, 280, dtype)
    expected = linalg.top_singular(matrix.float(), 8, method=method)
    alone = linalg.top_singular(matrix, 8, method=method)
    assert torch.equal(alone.values, expected.values)
    with simulated_cuda():
        found = linalg.top_singular(matrix.cuda(), 8, method=method)
        assert found.left.dtype == torch.float32
        product = ((found.left * found.values) @ found.right.T).cpu()
    wanted = (expected.left * expected.values) @ expected.right.T
    errors = [(matrix.double() - one.double()).norm() for one in (product, wanted)]
    assert abs(errors[0] / errors[1] - 1) <= 1e-6
    assert (product - wanted).norm() <= 1e-5 * matrix.float().norm()


class Widening(torch.utils._python_dispatch.TorchDispatchMode):
    """Records float32 and float64 results as large as a weight."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.found = numbers, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        large = isinstance(result, torch.Tensor) and result.numel() >= self.numbers
        if large and result.dtype in (torch.float32, torch.float64):
            self.found.append(str(func))
        return result


@every_narrow_dtype
@pytest.mark.parametrize("method", NARROW_METHODS)
def test_starts_of_16_bit_models(dtype, method, monkeypatch):
    """The simulated device gives the product of the CPU's factors, without a float32 copy."""
    monkeypatch.setattr("lora_init.linalg.dense.GRAM_DIMENSION", 0)  # as for large matrices
    base = nn.Sequential(*(nn.Linear(280, 320, bias=False, dtype=dtype) for _ in range(2)))
    for seed, layer in enumerate(base):
        layer.weight.data = weight_of(320, 280, dtype, seed=seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=method)
    expected = get_peft_model(copy.deepcopy(base), config, cache=False)
    with simulated_cuda():
        model = get_peft_model(copy.deepcopy(base), config, cache=False, device="cuda")
    for name, layer in model.layers.items():
        other = expected.layers[name]
        norm = layer.base_layer.weight.float().norm()
        gap = layer.lora_B @ layer.lora_A - other.lora_B @ other.lora_A
        # The objective agrees within 1e-6; the directions within what it leaves open.
        assert gap.norm() <= (1e-6 if method != "pissa" else 1e-5) * norm
        errors = [
            (weight_of(320, 280, dtype, seed=int(name)).double()
             - (one.scaling * one.lora_B @ one.lora_A).double()).norm()
            for one in (layer, other)
        ]  # fmt: skip
        assert abs(errors[0] / errors[1] - 1) <= 1e-6


@pytest.mark.parametrize("method", ["krylov", "powers"])
def test_no_float32_copy_of_the_matrix_is_made(method):
    matrix = weight_of(640, 560, torch.bfloat16)
    with simulated_cuda():
        there = matrix.cuda()
        with Widening(matrix.numel()) as widening:
            linalg.top_singular(there, 4, method=method, niter=2 if method == "powers" else None)
            linalg.leading_qr(there, 4)
    assert widening.found == []
