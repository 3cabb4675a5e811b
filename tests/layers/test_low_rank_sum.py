"""A 16-bit base with float32 factors: outputs, gradients and what is kept, against float64.

`parts` takes the products of a GPU, whose sums the CPU computes in float32.
"""

import copy
from pathlib import Path

import pytest
import torch
from simulated_device import simulated_cuda
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lora_init import LoraConfig, get_peft_model
from lora_init.layers import linear, low_rank_sum, two_parts

SCALING = 1.5
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ERROR = {False: 2e-6, True: 2e-5}
"""Of a gradient, relative to its norm: float32's, and that of 16 bits of two parts."""


@pytest.fixture(params=[False, True], ids=["wide", "parts"])
def parts(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(two_parts, "apply_to", lambda x, wide: x.dtype is torch.bfloat16)
    return request.param


def operands(*leading, dtype=torch.bfloat16, factors=torch.float32, sizes=(24, 16, 4)):
    """x, W, A, B, bias, A0, B0; A and B a little off their start."""
    generator = torch.Generator().manual_seed(5)
    columns, rows, rank = sizes
    shapes = (*leading, columns), (columns, rows), (rank, columns), (rows, rank), (rows,)
    x, weight, A0, B0, bias = (torch.randn(s, generator=generator) for s in shapes)
    A, B = (f + 0.05 * torch.randn(f.shape, generator=generator) for f in (A0, B0))
    tensors = *(t.to(dtype) for t in (x, weight)), A.to(factors), B.to(factors), bias.to(dtype)
    return [t.requires_grad_() for t in tensors], (A0.to(factors), B0.to(factors))


def in_float64(base, x, A, B, initial):
    """The base's own rounded product, and the adapter's."""
    delta = (x @ A.T) @ B.T
    if initial is not None:
        delta = delta - (x @ initial[0].double().T) @ initial[1].double().T
    return base + SCALING * delta


@pytest.mark.parametrize("subtracts", [False, True], ids=["kept", "subtracted"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", HALVES)
def test_output_and_gradients(name, leading, with_bias, subtracts, parts):
    (x, weight, A, B, bias), initial = operands(*leading, dtype=HALVES[name])
    bias, initial = bias if with_bias else None, initial if subtracts else None
    actual = low_rank_sum.low_rank_sum(x, weight, A, B, bias, initial, SCALING)
    assert actual.dtype == x.dtype
    rounded = nn.functional.linear(x, weight.T, bias).detach().double()
    wide = [t.detach().double().requires_grad_() for t in (x, A, B)]
    expected = in_float64(rounded, *wide, initial)
    epsilon = torch.finfo(x.dtype).eps
    assert (actual.double() - expected).abs().le(0.51 * epsilon * expected.abs() + 1e-4).all()

    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    direction = direction.to(x.dtype)
    (in_float64(wide[0] @ weight.detach().double(), *wide, initial) * direction).sum().backward()
    inputs = [x, weight, A, B, *([] if bias is None else [bias])]
    found = torch.autograd.grad(actual, inputs, direction)
    for ours, theirs in zip((found[2], found[3]), (wide[1].grad, wide[2].grad), strict=True):
        assert ours.dtype == torch.float32
        assert torch.linalg.norm(ours - theirs) <= ERROR[parts] * torch.linalg.norm(theirs)
    assert torch.linalg.norm(found[0] - wide[0].grad) <= 2 * epsilon * torch.linalg.norm(
        wide[0].grad
    )
    by_weight = x.detach().reshape(-1, 24).T.float() @ direction.reshape(-1, 16).float()
    torch.testing.assert_close(found[1].float(), by_weight, rtol=epsilon, atol=epsilon)


@pytest.mark.parametrize("size", [False, True], ids=["large", "small"])
@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("name", HALVES)
def test_step_0_is_the_base_to_the_bit(name, conv, size, parts, monkeypatch):
    monkeypatch.setattr(linear, "is_small", lambda x: size)
    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(40, 48) if conv else nn.Linear(48, 40)).to(HALVES[name])
    for method in ("kaiming", "pissa"):
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=method)
        model = get_peft_model(copy.deepcopy(base), config)
        x = torch.randn(3, 7, 48).to(HALVES[name]).requires_grad_()
        assert torch.equal(model(x), base(x))
        with torch.no_grad():
            assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("method", ["kaiming", "pissa"])
def test_only_the_16_bit_input_is_kept(method, parts):
    """And the few numbers a position between A and B."""
    positions, width, rank = 512, 64, 4
    config = LoraConfig(r=rank, target_modules=["0"], init_lora_weights=method)
    model = get_peft_model(nn.Sequential(nn.Linear(width, width)).bfloat16(), config)
    ranks = rank if method == "kaiming" else 2 * rank
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(positions, width).bfloat16().requires_grad_()
    assert not linear.is_small(x)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model(x)
    assert sum(kept.values()) <= positions * (2 * width + 4 * ranks)
    outputs.sum().backward()


def test_compiled_is_eager_in_one_graph(monkeypatch):
    """With the products of a GPU; the others are compiled in `test_training_environments`."""
    monkeypatch.setattr(two_parts, "apply_to", lambda x, wide: x.dtype is torch.bfloat16)
    monkeypatch.setattr(linear, "is_small", lambda x: False)
    torch._dynamo.reset()
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")
    model = get_peft_model(nn.Sequential(nn.Linear(32, 32)).bfloat16(), config)
    with torch.no_grad():
        model.layers["0"].lora_B += 0.1
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for one in (model, compiled):
        model.zero_grad()
        outputs = one(x)
        outputs.sum().backward()
        results.append([outputs.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-5)


def test_first_and_second_derivatives_by_differences():
    tensors, initial = operands(2, dtype=torch.float64, factors=torch.float64, sizes=(3, 2, 1))

    def subtracted(*tensors):
        return low_rank_sum.low_rank_sum(*tensors, initial, SCALING)

    assert gradcheck(subtracted, tensors)
    assert gradgradcheck(subtracted, tensors)


CHANGES = {
    "a hook": lambda layer: layer.base_layer.register_forward_hook(lambda m, a, out: out * 2),
    "a forward on the instance": lambda layer: setattr(
        layer.base_layer, "forward", lambda x: 2 * nn.functional.linear(x, layer.base_layer.weight)
    ),
    "another weight": lambda layer: setattr(
        layer.base_layer, "weight", nn.Parameter(layer.base_layer.weight.detach() * 2)
    ),
    "other dtypes": lambda layer: layer.float(),
    "16-bit factors": lambda layer: layer.bfloat16(),
    "a frozen factor": lambda layer: layer.lora_A.requires_grad_(False),
    "dropout": lambda layer: setattr(layer.train(), "dropout", nn.Dropout(1.0)),
    "another start": lambda layer: layer.initial_lora_A.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("size", [False, True], ids=["large", "small"])
def test_a_call_sees_every_change_since_the_last(change, size, monkeypatch):
    """Nothing that was decided in one call holds in the next."""
    monkeypatch.setattr(linear, "is_small", lambda x: size)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16, bias=False)).bfloat16()
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")
    layer = get_peft_model(base, config).layers["0"]
    x = torch.randn(5, 16).bfloat16()
    before = layer(x)
    CHANGES[change](layer)
    x = x.to(layer.base_layer.weight.dtype)
    doubled = 2 if change in ("a hook", "a forward on the instance") else 1
    weight = layer.base_layer.weight.double() * doubled
    A, B, A0, B0 = (
        t.detach().double()
        for t in (layer.lora_A, layer.lora_B, layer.initial_lora_A, layer.initial_lora_B)
    )
    if change == "dropout":  # of all inputs of the adapter
        B = B * 0
    expected = x.double() @ (weight + layer.scaling * (B @ A - B0 @ A0)).T
    actual = layer(x)
    assert (actual - expected).abs().max() <= 0.02 * expected.abs().max()
    assert actual.dtype == x.dtype
    actual.sum().backward()
    assert (layer.lora_A.grad is None) == (change == "a frozen factor")
    same = change in ("other dtypes", "16-bit factors", "a frozen factor")
    assert same == torch.allclose(before.double(), actual.double(), atol=0.02)


VIEWS = {
    "_unsafe_view", "alias", "detach", "expand", "lift_fresh", "new_empty", "permute",
    "promote_types", "select", "slice", "split", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip


class Kernels(TorchDispatchMode):
    """The operations that a device computes, views left out, while on."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.calls.append((name, result.numel() if isinstance(result, torch.Tensor) else 0))
        return result


def promised_kernels():
    """{(base, start): (forward, backward)} of the table in docs/gpu.md."""
    text = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    section = text.split("## Training step")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:3] == "| `"]
    return {row[0].strip("`"): tuple(map(int, row[1:3])) for row in rows}


STEPS = {
    "kept": ("kaiming", False, False),
    "subtracted": ("pissa", False, False),
    "kept, small": ("kaiming", False, True),
    "subtracted, small": ("pissa", False, True),
    "kept, DoRA": ("kaiming", True, False),
    "subtracted, DoRA": ("pissa", True, False),
}


@pytest.mark.parametrize("name", STEPS)
def test_kernels_of_a_step_on_a_gpu(name, monkeypatch):
    """No more than docs/gpu.md says: they would be launched for every layer and step."""
    method, use_dora, small = STEPS[name]
    monkeypatch.setattr(linear, "is_small", lambda x: small)
    with simulated_cuda():
        base = nn.Sequential(nn.Linear(64, 64)).bfloat16().cuda()
        config = LoraConfig(
            r=4, target_modules=["0"], init_lora_weights=method, use_dora=use_dora
        )  # fmt: skip
        layer = get_peft_model(base, config, cache=False).layers["0"]
        x = torch.randn(32, 64, dtype=torch.bfloat16).cuda().requires_grad_()
        with Kernels() as forward:
            outputs = layer(x)
        forward = len(forward.calls)
        gradient = torch.ones_like(outputs)
        with Kernels() as backward:
            outputs.backward(gradient)
        backward = len(backward.calls)
    assert (forward, backward) == promised_kernels()[name]
