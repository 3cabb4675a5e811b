"""Calibration on a GPU, simulated: its precision, and how often it launches, waits and copies."""

import re
from collections import Counter
from pathlib import Path

import pytest
import simulated_device
import torch
from measures import relative_gap
from simulated_device import CPU, CUDA, place, simulated_cuda, tensors_in
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_init import LoraConfig, WithLoss, get_peft_model
from lora_init.calibration.collect import collect
from lora_init.calibration.sums import RunningMoments
from lora_init.linalg import gram, mixed_products
from lora_init.linalg.gram import LARGEST_BLOCK
from lora_init.linalg.mixed_products import Support, add_product
from lora_init.registry import CalibrationRequest

PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
REQUESTS = {
    "second moments": CalibrationRequest(),
    "second moments in float64": CalibrationRequest(smallest=True),
    "gradients": CalibrationRequest(gradients=True),
}
CUDA_DEVICE, CPU_DEVICE = torch.device(CUDA), torch.device(CPU)
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def spread_rows(count, width, mean=3.0, dtype=torch.float32):
    """Rows whose standard deviations span two decades, about a mean that is not zero."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(width, width, generator=generator) * torch.logspace(-2, 0, width)
    rows = torch.randn(count, width, generator=generator) @ spread
    return (rows + mean * torch.randn(width, generator=generator)).to(dtype)


def moments_on_cuda(parts, width, dtype=torch.float32):
    with simulated_cuda():
        sums = RunningMoments(width, CUDA_DEVICE, dtype)
        for part in parts:
            sums.add(part.cuda())
        found = sums.moments
        return found.tokens, found.products.cpu(), found.mean.cpu(), found.variance.cpu()


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "batch"), [(0.0, 100), (3.0, 1500), (100.0, LARGEST_BLOCK + 3)])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_two_16_bit_parts_are_as_precise_as_stated(dtype, mean, batch):
    """Each product to 2^-15, the matrix to 2^-18, variances to 1e-6, compared with float64."""
    rows = spread_rows(5000, 90, mean, dtype)
    tokens, products, found_mean, variance = moments_on_cuda(rows.split(batch), 90)
    x = rows.double() - rows.double().mean(0)
    exact = x.T @ x / len(x)
    assert tokens == 5000
    assert ((products - exact).abs() <= 2**-15 * (x.abs().T @ x.abs() / len(x)) + 1e-12).all()
    assert relative_gap(products, exact) <= 2**-18
    assert abs(variance - exact.trace()) <= 1e-6 * exact.trace()
    assert (found_mean - rows.double().mean(0)).abs().max() <= 1e-5 * exact.diagonal().max().sqrt()


@pytest.mark.parametrize("columns", [64, 200, 300])
def test_two_parts_of_columns_that_are_halved(monkeypatch, columns):
    monkeypatch.setitem(gram.SMALLEST_BLOCK, "cuda", 64)
    rows = spread_rows(1200, columns, dtype=torch.bfloat16)
    products = moments_on_cuda([rows], columns)[1]
    assert relative_gap(products, rows.double().T.cov(correction=0)) <= 2**-18


@pytest.mark.parametrize(
    ("sums", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str
)
@pytest.mark.parametrize("rows", [torch.float32, torch.float64], ids=str)
def test_other_rows_and_sums_are_multiplied_in_the_dtype_of_the_sums(rows, sums, tolerance):
    x = spread_rows(3000, 70, dtype=rows)
    products = moments_on_cuda(x.split(700), 70, sums)[1]
    assert products.dtype == sums
    exact = x.double().T.cov(correction=0)
    assert relative_gap(products, exact) <= (tolerance if rows == torch.float64 else 1e-6)


def test_sums_in_float64_over_16_bit_rows_are_exact():
    x = spread_rows(3000, 70, dtype=torch.bfloat16)
    products = moments_on_cuda(x.split(700), 70, torch.float64)[1]
    assert relative_gap(products, x.double().T.cov(correction=0)) <= 1e-6


def test_rows_of_changing_dtypes():
    x = spread_rows(4000, 40, dtype=torch.bfloat16)
    parts = [x[:2000], x[2000:2100].float(), x[2100:2200], x[2200:].float()]
    products = moments_on_cuda(parts, 40)[1]
    assert relative_gap(products, x.double().T.cov(correction=0)) <= 2**-18


def test_rows_that_wait_are_copies():
    x = spread_rows(300, 8)
    with simulated_cuda():
        sums = RunningMoments(8, CUDA_DEVICE)
        activation = x.cuda()
        sums.add(activation)
        activation.zero_()
        found = sums.moments.products.cpu()
    assert relative_gap(found, x.double().T.cov(correction=0)) <= 1e-6


@pytest.mark.parametrize("method", ["eva", "corda"])
def test_the_objective_of_a_16_bit_model_agrees_with_the_cpus(method):
    """EVA's captured variance, and CorDA's error of W C, within 1e-6."""
    torch.manual_seed(0)
    weight = torch.randn(20, 48)
    x = spread_rows(6000, 48).to(torch.bfloat16)
    moment = x.double().T @ x.double() / len(x)

    def objective(where):
        model = nn.Sequential(nn.Linear(48, 20, bias=False)).to(torch.bfloat16)
        model[0].weight.data = weight.to(torch.bfloat16)
        config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=method)
        layer = get_peft_model(model.to(where), config, calibration=[x.to(where)[None]]).layers["0"]
        if method == "eva":
            basis = torch.linalg.qr(layer.lora_A.detach().cpu().double().T)[0]
            return torch.trace(basis.T @ x.double().T.cov(correction=0) @ basis)
        rest = weight.to(torch.bfloat16).double() - layer.initial_product().cpu().double()
        return torch.trace(rest @ moment @ rest.T).sqrt()

    expected = objective(CPU)
    with simulated_cuda():
        found = objective(CUDA)
    assert abs(found - expected) <= 1e-6 * expected


def test_a_cached_calibration_is_of_the_devices_that_computed_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_INIT_CACHE", str(tmp_path))
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="eva")
    x = spread_rows(40, 16)
    found = []

    def seen(model, args, output):
        found.append(output.device.type)

    def adapt(where, device=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 8)).to(where)
        handle = model.register_forward_hook(seen)
        get_peft_model(model, config, calibration=[x], device=device)
        handle.remove()

    adapt(CPU)
    adapt(CPU)
    with simulated_cuda():
        adapt(CPU, CUDA_DEVICE)
        adapt(CUDA, CPU_DEVICE)
        adapt(CUDA)
        adapt(CUDA)
    assert found == [CPU, CPU, CUDA, CUDA]


# -- products of 16-bit factors --------------------------------------------------------------------


def refuse_float32_totals(total, *factors, out_dtype=None, **settings):
    raise RuntimeError("self and mat2 must have the same dtype")


def no_such_argument(*factors, out_dtype=None):
    raise TypeError("mm() got an unexpected keyword argument 'out_dtype'")


@pytest.mark.parametrize(
    ("support", "patches"),
    [
        (Support.SUM, {}),
        (Support.PRODUCT, {"addmm": refuse_float32_totals}),
        (Support.NONE, {"addmm": refuse_float32_totals, "mm": no_such_argument}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_products_are_exact_whatever_the_device_supports(monkeypatch, support, patches, dtype):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(7, 30, generator=generator).to(dtype) for _ in range(2))
    total = torch.randn(7, 7, generator=generator)
    exact = total.double() - 2 * left.double() @ right.double().T
    mixed_products.mixed_support.cache_clear()
    for name, function in patches.items():
        monkeypatch.setattr(torch, name, function)
    with simulated_cuda():
        assert mixed_products.mixed_support(torch.device("cuda", 0), dtype) is support
        found = total.cuda()
        add_product(found, left.cuda(), right.cuda().T, scale=-2.0)
        found = found.cpu()
    mixed_products.mixed_support.cache_clear()
    assert (found - exact).abs().max() <= 1e-5
    add_product(total, left, right.T, scale=-2.0)
    assert (total - exact).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_gradients_of_a_16_bit_model_are_exact_products(dtype):
    """Under a linear loss x and g are exact in 16 bits, only their sum is not."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16)).to(dtype)
    slope = torch.randn(16, generator=generator).to(dtype)
    batches = [torch.randn(40, 24, generator=generator).to(dtype) for _ in range(5)]
    with simulated_cuda(), Operations() as seen:
        mixed_products.mixed_support(torch.device("cuda", 0), dtype)
        seen.overloads.clear()
        data = WithLoss(batches, lambda model, x: (model(x) * slope.cuda()).sum())
        found = collect(model.cuda(), ["0"], REQUESTS["gradients"], data)
        gradient = found.layers["0"].gradient.cpu()
    exact = torch.outer(slope.double(), sum(batch.double().sum(0) for batch in batches) / 5)
    assert relative_gap(gradient, exact) <= 1e-6
    assert seen.overloads["aten.addmm.dtype_out"] == len(batches)


# -- launches, waits and copies --------------------------------------------------------------------

NOT_A_KERNEL = {
    "alias", "detach", "empty", "empty_like", "lift_fresh", "_local_scalar_dense", "_unsafe_view",
}  # fmt: skip
WAITS = {"_local_scalar_dense", "nonzero"}


class Operations(TorchDispatchMode):
    """Kernels on CUDA by name, and waits for their results; `moves` counts copies."""

    def __init__(self):
        super().__init__()
        self.kernels, self.overloads, self.waits = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        with torch._C.DisableTorchFunction():
            there = any(place(each) == CUDA for each in tensors_in(args, kwargs or {}, result))
        aliases = [one.alias_info for one in func._schema.returns]
        if there and name in WAITS:
            self.waits[name] += 1
        if there and name not in NOT_A_KERNEL and not any(a and not a.is_write for a in aliases):
            self.kernels[name] += 1
            self.overloads[str(func)] += 1
        return result


class Pair(nn.Module):
    """Two layers that share an input, and one that reads another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.out = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x, attention_mask=None):
        return self.out(self.query(x) * self.key(x))


def counted(request, monkeypatch, count, data=CPU, device=None):
    """What a pass over so many batches does; kernels are without those of the forward pass."""
    mask = torch.ones(1, 1200, dtype=torch.long)
    mask[:, -7:] = 0
    batches = [
        {"x": spread_rows(1200, 16, dtype=torch.bfloat16)[None], "attention_mask": mask}
        for _ in range(count)
    ]
    moves, move, target_of = Counter(), simulated_device.moved, simulated_device.target_of

    def targeted(tensor, *settings, non_blocking=False, **more):
        target = target_of(tensor, *settings, **more)
        waits = place(tensor) == CPU and target[0] == CUDA and not non_blocking
        moves["waiting for the device"] += waits
        return target

    def noted(tensor, where, *settings, **more):
        moves[place(tensor), where] += place(tensor) != where
        return move(tensor, where, *settings, **more)

    with simulated_cuda():
        model = Pair().to(torch.bfloat16).cuda()
        batches = [{name: value.to(data) for name, value in batch.items()} for batch in batches]
        if request.gradients:
            batches = WithLoss(batches, lambda model, x: model(**x).float().square().mean())
        mixed_products.mixed_support(torch.device("cuda", 0), torch.bfloat16)  # once a process
        monkeypatch.setattr(simulated_device, "moved", noted)
        monkeypatch.setattr(simulated_device, "target_of", targeted)
        with Operations() as seen:
            collect(model, ["query", "key", "out"], request, batches, device=device)
        monkeypatch.undo()
    return seen, moves


def documented(name):
    """Kernels per input and batch, waits per batch and at the end, as docs/gpu.md has them."""
    row = re.search(rf"^\| {re.escape(name)} \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
    return [int(figure) for figure in row.groups()]


@pytest.mark.parametrize("data", [CPU, CUDA])
@pytest.mark.parametrize("name", ["second moments", "second moments in float64"])
def test_kernels_and_waits_are_those_in_the_documents(monkeypatch, name, data):
    (few, _), (more, moves) = (counted(REQUESTS[name], monkeypatch, n, data) for n in (2, 3))
    kernels, waits, at_end = documented(name)
    each = more.kernels - few.kernels
    assert each["index"] == 2  # the rows that count of two inputs
    # The forward pass: three products, and one of two outputs.
    ours = sum(each.values()) - each["index"] - 4
    if data == CPU:
        assert sum(more.waits.values()) == sum(few.waits.values()) == 3 * waits
        assert moves["waiting for the device"] == 0
        assert moves[CUDA, CPU] == at_end
    else:
        ours -= 4  # the mask as truth values, twice, their sum, and which are true
        assert more.waits - few.waits == {"nonzero": 1}
        assert moves[CUDA, CPU] == at_end + 1  # how many tokens there were
    assert ours == 2 * kernels
    assert each["clone"] == 0


def test_waits_of_gradients(monkeypatch):
    (few, _), (more, moves) = (counted(REQUESTS["gradients"], monkeypatch, n) for n in (2, 3))
    kernels, waits, at_end = documented("gradients")
    assert sum((more.waits - few.waits).values()) == waits
    assert moves[CUDA, CPU] == at_end
    each = more.overloads - few.overloads
    assert each["aten.addmm.dtype_out"] + each["aten.clone.default"] == 3 * kernels


def test_masks_on_either_device_select_the_same_rows(monkeypatch):
    request = REQUESTS["second moments"]
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    x = spread_rows(18, 16).view(2, 9, 16)
    x[0, 5:] = float("nan")
    found = []
    with simulated_cuda():
        for where in (CPU, CUDA):
            batch = {"x": x.to(where), "attention_mask": mask.to(where)}
            inputs = collect(Pair().cuda(), ["query"], request, [batch]).layers["query"].inputs
            found.append((inputs.tokens, inputs.covariance.cpu()))
    assert found[0][0] == found[1][0] == 14
    assert torch.equal(found[0][1], found[1][1])


def test_the_first_non_finite_input_is_named():
    class Broken(Pair):
        def forward(self, x):
            return self.out(self.query(x) / 0)

    with simulated_cuda():
        model = Broken().cuda()
        with pytest.raises(ValueError, match="inputs of 'out' are not finite"):
            collect(model, ["query", "out"], REQUESTS["second moments"], [torch.ones(3, 16)])
