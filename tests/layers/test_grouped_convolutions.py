"""Adapters on grouped and depthwise convolutions: each group is a matrix with its own start."""

import copy

import peft
import pytest
import torch
from measures import EPSILON, assert_gap, train
from models import spread_weight
from torch import nn
from torch.nn import functional

from lora_init import LoraConfig, LoraModel, WithLoss, calibrate, get_peft_model
from lora_init.weights.patches import CLASSES

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

CASES = {
    "line": (1, {"groups": 2, "padding": 1}),
    "picture": (2, {"groups": 3, "padding": (1, 0), "stride": (1, 2)}),
    "volume": (3, {"groups": 2, "kernel_size": (2, 3, 1), "padding": (0, 1, 0)}),
    "depthwise": (2, {"groups": 6, "padding": 1}),
    "multiplied": (1, {"groups": 6, "out": 12}),
}
every_case = pytest.mark.parametrize("case", CASES)


def grouped(case, dtype=torch.float32):
    dimensions, settings = CASES[case]
    settings = {"kernel_size": 3, "out": 6} | settings
    module = CLASSES[dimensions](6, settings.pop("out"), **settings)
    with torch.no_grad():
        for part in module.weight.chunk(module.groups):
            part.copy_(spread_weight(len(part), part[0].numel()).view(part.shape))
    return nn.Sequential(module).to(dtype)


def inputs(base, seed=1):
    size = (2, 6, 7, 6, 5)[: base[0].weight.ndim]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(base[0].weight.dtype)


def adapt(base, calibration=None, **settings):
    config = LoraConfig(**{"r": 6, "lora_alpha": 9, "target_modules": ["0"]} | settings)
    return get_peft_model(copy.deepcopy(base), config, calibration=calibration)


def change(layer):
    """s B A of a trained layer, computed group by group in float64."""
    groups = layer.base_layer.groups
    lora_A, lora_B = layer.lora_A.double().chunk(groups), layer.lora_B.double().chunk(groups)
    return layer.scaling * torch.cat([b @ a for a, b in zip(lora_A, lora_B, strict=True)])


@every_case
@pytest.mark.parametrize("method", [True, "pissa", "olora"])
def test_output_is_the_grouped_convolution(case, method):
    base = grouped(case)
    x = inputs(base)
    model = adapt(base, init_lora_weights=method)
    assert_gap(model(x), base(x), EPSILON[torch.float32])
    layer = train(model, size=0.2).layers["0"]
    assert layer.lora_A.shape == (6, base[0].weight[0].numel())
    assert layer.lora_B.shape == (base[0].out_channels, 6 // base[0].groups)
    dense = copy.deepcopy(base[0]).double()
    kernel = layer.base_layer.weight.double() + change(layer).view(dense.weight.shape)
    dense.weight = nn.Parameter(kernel.detach())
    expected = dense(x.double())
    assert_gap(model(x), expected, EPSILON[torch.float32])
    assert_gap(model(x[0]), expected[0], EPSILON[torch.float32])
    assert_gap(layer.weight, kernel, EPSILON[torch.float32])
    with model.disable_adapter():
        assert_gap(model(x), base(x), EPSILON[torch.float32])
    model.merge_adapter()
    assert_gap(model(x), expected, EPSILON[torch.float32])
    model.unmerge_adapter()
    assert_gap(copy.deepcopy(model).merge_and_unload()(x), expected, EPSILON[torch.float32])
    assert_gap(model.unload()(x), base(x), EPSILON[torch.float32])


@every_case
def test_each_group_starts_from_its_own_matrix(case):
    base = grouped(case)
    layer = adapt(base, init_lora_weights="pissa").layers["0"]
    groups = base[0].groups
    parts = layer.initial_product().double().chunk(groups)
    for part, weight in zip(parts, base[0].weight.detach().double().chunk(groups), strict=True):
        left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        count = 6 // groups
        assert_gap(part, left[:, :count] * values[:count] @ right[:count], 1e-5)


@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_preserve_the_output_and_train(dtype, use_dora):
    base = grouped("picture", dtype)
    x = inputs(base)
    model = adapt(base, init_lora_weights="pissa", use_dora=use_dora)
    assert model.layers["0"].base_state == ("edited" if dtype.itemsize == 8 else "in_forward")
    assert_gap(model(x), base(x), 4 * EPSILON[dtype] if dtype.itemsize == 2 else 1e-6)
    model(x).float().square().sum().backward()
    assert model.layers["0"].lora_A.grad.any()
    assert model.layers["0"].lora_B.grad.any()
    expected = train(model, size=0.2)(x)
    merged = model.merge_and_unload()(x)
    assert_gap(merged, expected, 8 * EPSILON[dtype] if dtype.itemsize == 2 else 1e-6)


def sum_of_sines(model, x):
    return model(x).sin().sum()


@every_case
def test_the_gradient_is_that_of_the_grouped_weight(case):
    base = grouped(case)
    batches = WithLoss([inputs(base, seed) for seed in (1, 2)], sum_of_sines)
    config = LoraConfig(r=6, target_modules=["0"], init_lora_weights="lora_one")
    found = calibrate(base, config, batches)
    gradient = found.layers["0"].gradient
    for batch in batches.batches:
        (sum_of_sines(base, batch) / 2).backward()
    assert_gap(gradient, base[0].weight.grad.flatten(1), 1e-5)


def test_a_start_from_the_gradient_preserves_the_output():
    base = grouped("picture")
    batches = WithLoss([inputs(base, seed) for seed in (1, 2)], sum_of_sines)
    model = adapt(base, batches, r=3, init_lora_weights="lora_ga")
    x = inputs(base)
    assert_gap(model(x), base(x), 1e-5)


# -- files -----------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("method", [True, "pissa"])
def test_peft_and_ours_load_the_file(case, method, tmp_path):
    base = grouped(case)
    x = inputs(base)
    model = train(adapt(base, init_lora_weights=method, lora_bias=True), size=0.2)
    expected = model(x)
    model.save_pretrained(tmp_path)
    assert_gap(LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), expected, 1e-6)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_gap(theirs(x), expected, 1e-5)


def test_a_file_of_dora_is_read_by_ours_alone(tmp_path):
    """PEFT's DoRA multiplies B by the dense A, whose shapes do not fit with groups."""
    base = grouped("picture")
    model = train(adapt(base, init_lora_weights="pissa", use_dora=True), size=0.2)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    x = inputs(base)
    assert_gap(LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x), 1e-6)


@every_case
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_ours_loads_what_peft_trained_for_all_channels(case, trained, tmp_path):
    """PEFT's kernels read the channels of all groups, which no grouped weight does."""
    base = grouped(case)
    x = inputs(base)
    config = peft.LoraConfig(r=6, lora_alpha=9, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    if trained:
        train(theirs, size=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    assert_gap(ours(x), theirs(x), 1e-6)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    layer, other = ours.layers["0"], theirs.base_model.model[0]
    wanted = other.lora_B["default"].weight.grad
    assert_gap(layer.lora_B.grad, wanted.flatten(1), 1e-5)
    if trained:
        wanted = other.lora_A["default"].weight.grad
        assert_gap(layer.lora_A.grad, wanted.flatten(1), 1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert_gap(again(x), theirs(x), 1e-6)
    again = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert_gap(again(x), theirs(x), 1e-6)
    before = again.state_dict()
    for refused in (again.merge_adapter, again.merge_and_unload, lambda: layer.weight):
        with pytest.raises(ValueError, match="cannot hold this adapter.*Keep the adapter unmerged"):
            refused()
    assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items())
    assert_gap(again.unload()(x), base(x), 1e-6)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rank", "error", "message"),
    [
        (True, 4, ValueError, "rank 4 is not supported: must be a multiple of groups=3"),
        ("pissa", 9, ValueError, "'0, one of 3 groups': rank 3 exceeds min.out, in. = 2"),
        ("eva", 6, TypeError, "groups=3, which eva does not support, because it reads the inputs"),
        ("loftq", 6, TypeError, "loftq does not support, because it replaces the base weight"),
        ("lora_xs", 6, TypeError, "lora_xs does not support, because it trains a core"),
    ],
)
def test_what_groups_cannot_have_is_refused(method, rank, error, message):
    base = grouped("picture")
    with pytest.raises(error, match=message):
        adapt(base, r=rank, init_lora_weights=method)


def test_a_depthwise_network_gets_adapters_by_an_expression():
    """A block of a mobile network: pointwise, depthwise and pointwise convolutions."""
    base = nn.Sequential()
    base.add_module("conv_in", nn.Conv2d(4, 8, 1))
    base.add_module("conv_depthwise", nn.Conv2d(8, 8, 3, padding=1, groups=8))
    base.add_module("norm", nn.BatchNorm2d(8))
    base.add_module("conv_out", nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 4, 6, 6)
    model = adapt(
        base.eval(), r=2, target_modules=r"conv.*", rank_pattern={"conv_depthwise": 8},
        init_lora_weights="pissa",
    )  # fmt: skip
    assert [(t.name, t.rank, t.groups) for t in model.plan.targets] == [
        ("conv_in", 2, 1), ("conv_depthwise", 8, 8), ("conv_out", 2, 1),
    ]  # fmt: skip
    assert_gap(model(x), base(x), 1e-5)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.plan.parameters == trainable == 2 * (4 + 8) + 8 * (9 + 1) + 2 * (8 + 4)
    assert functional.mse_loss(train(model)(x), base(x)) > 0
