"""Adapters on grouped and depthwise convolutions: each group is a matrix with its own start."""

import copy

import peft
import pytest
import torch
from measures import EPSILON, assert_gap, train
from models import spread_weight
from torch import nn
from torch.nn import functional

from lora_init import (
    Calibration,
    LoraConfig,
    LoraModel,
    WithLoss,
    calibrate,
    get_peft_model,
    list_initializers,
)
from lora_init.initializers.eva import EvaOptions
from lora_init.linalg.moments import sums_bytes
from lora_init.registry import resolve
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
GEOMETRY = CASES | {
    "four": (2, {"groups": 4, "channels": 8, "out": 8, "padding": 1}),
    "dilated": (2, {"groups": 2, "padding": 2, "dilation": 2, "stride": (2, 1)}),
    "same": (1, {"groups": 3, "padding": "same", "dilation": 2}),
    "reflected": (2, {"groups": 2, "padding": 1, "padding_mode": "reflect"}),
    "circular": (1, {"groups": 6, "padding": 1, "padding_mode": "circular"}),
    "replicated": (2, {"groups": 3, "padding": (0, 1), "padding_mode": "replicate"}),
}
every_geometry = pytest.mark.parametrize("case", GEOMETRY)


def grouped(case, dtype=torch.float32):
    dimensions, settings = GEOMETRY[case]
    settings = {"kernel_size": 3, "channels": 6, "out": 6} | settings
    module = CLASSES[dimensions](settings.pop("channels"), settings.pop("out"), **settings)
    with torch.no_grad():
        for part in module.weight.chunk(module.groups):
            part.copy_(spread_weight(len(part), part[0].numel()).view(part.shape))
    return nn.Sequential(module).to(dtype)


def inputs(base, seed=1):
    size = (2, base[0].in_channels, 7, 6, 5)[: base[0].weight.ndim]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(base[0].weight.dtype)


def adapt(base, calibration=None, cache=True, **settings):
    config = LoraConfig(**{"r": 6, "lora_alpha": 9, "target_modules": ["0"]} | settings)
    return get_peft_model(copy.deepcopy(base), config, calibration=calibration, cache=cache)


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


# -- inputs ----------------------------------------------------------------------------------------

FROM_INPUTS = [
    spec.name for spec in list_initializers() if "inputs" in spec.reads and spec.base != "replace"
]


def single(base, group):
    """One group of a convolution as a separate module."""
    whole = base[0]
    module = type(whole)(
        whole.in_channels // whole.groups,
        whole.out_channels // whole.groups,
        **{
            name: getattr(whole, name)
            for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        },
    )
    with torch.no_grad():
        module.weight.copy_(whole.weight.chunk(whole.groups)[group])
        module.bias.copy_(whole.bias.chunk(whole.groups)[group])
    return module


def patches_of(base, x, group):
    """The patches of one group in float64: the outputs of its convolution with unit kernels."""
    module = single(base, group)
    size = module.weight[0].numel()
    units = torch.eye(size, dtype=torch.float64).view(size, *module.weight.shape[1:])
    found = module.double()._conv_forward(x.double().chunk(base[0].groups, 1)[group], units, None)
    return found.movedim(1, -1).flatten(0, -2)


class Split(nn.Module):
    """The groups of a convolution as modules that have the names of their random streams."""

    def __init__(self, base):
        super().__init__()
        self.count = base[0].groups
        for group in range(self.count):
            self.add_module(f"0[{group}]", single(base, group))

    def forward(self, x):
        parts = zip(self.children(), x.chunk(self.count, 1), strict=True)
        return torch.cat([module(part) for module, part in parts], 1)


def batches_of(base, method):
    """Batches for a method: with a loss, or in the sets that it compares."""
    batches = [inputs(base, seed) for seed in (1, 2, 3)]
    spec, options = resolve(method)
    request = spec.request(options)
    if request.sets:
        return {name: batches[index:] for index, name in enumerate(request.sets)}
    return WithLoss(batches, sum_of_sines) if request.gradients else batches


def fixed_ranks(method):
    """The method without rank allocation, as on groups."""
    if not resolve(method)[0].allocates:
        return method
    settings = {"smallest": 1.0, "largest": 1.0} if method == "gora" else {"rho": 1.0}
    return {"name": method, **settings}


@every_geometry
def test_the_moments_of_a_group_are_those_of_its_own_patches(case):
    base = grouped(case)
    batches = [inputs(base, seed) for seed in (1, 2)]
    config = LoraConfig(r=base[0].groups, target_modules=["0"], init_lora_weights="eva")
    found = calibrate(base, config, batches).layers["0"].inputs
    assert len(found.members) == base[0].groups
    for group, one in enumerate(found.members):
        rows = torch.cat([patches_of(base, x, group) for x in batches])
        assert one.tokens == len(rows)
        assert_gap(one.mean, rows.mean(0), 1e-5)  # a mean near zero of rows in float32
        assert_gap(one.second_moment, rows.T @ rows / len(rows), 1e-6)
        assert_gap(one.covariance, rows.T.cov(correction=0), 1e-6)


@pytest.mark.parametrize("case", ["picture", "dilated", "four"])
def test_corda_and_eva_follow_their_formulas_in_each_group(case):
    base = grouped(case)
    groups, rank = base[0].groups, base[0].groups  # rank 1 in each
    batches = [inputs(base, seed) for seed in (1, 2)]
    starts = {
        method: adapt(base, batches, r=rank, init_lora_weights=method).layers["0"]
        for method in ("corda", "eva")
    }
    weights = base[0].weight.detach().double().flatten(1).chunk(groups)
    products = starts["corda"].initial_product().double().chunk(groups)
    directions = starts["eva"].lora_A.detach().double().chunk(groups)
    for group in range(groups):
        rows = torch.cat([patches_of(base, x, group) for x in batches])
        left = torch.linalg.svd(weights[group] @ (rows.T @ rows / len(rows)))[0][:, :1]
        assert_gap(products[group], left @ left.T @ weights[group], 1e-5)
        top = torch.linalg.eigh(rows.T.cov(correction=0))[1][:, -1:]
        assert_gap(directions[group].T @ directions[group], top @ top.T, 1e-5)


@pytest.mark.filterwarnings("ignore:sc_lora. in 6 of 6 layers, the first is '0.0.'")
@pytest.mark.parametrize("case", ["depthwise", "four", "reflected"])
@pytest.mark.parametrize("method", [*FROM_INPUTS, "gora"])
def test_each_group_starts_like_a_convolution_of_its_own(method, case):
    base = grouped(case)
    count = base[0].groups
    batches, x = batches_of(base, method), inputs(base, 7)
    model = adapt(base, batches, r=count, lora_alpha=count, init_lora_weights=method, cache=False)
    names = [f"0[{group}]" for group in range(count)]
    apart = adapt(
        Split(base), batches, r=1, lora_alpha=1, target_modules=names,
        init_lora_weights=fixed_ranks(method), cache=False,
    )  # fmt: skip
    layer = model.layers["0"]
    lora_A, lora_B = layer.lora_A.chunk(count), layer.lora_B.chunk(count)
    for group, name in enumerate(names):
        wanted = apart.layers[name]
        assert lora_B[group].any() == wanted.lora_B.any()
        if wanted.lora_B.any():
            found = lora_B[group].double() @ lora_A[group].double()
            assert_gap(found, wanted.lora_B.double() @ wanted.lora_A.double(), 1e-5)
        assert_gap(lora_A[group].T @ lora_A[group], wanted.lora_A.T @ wanted.lora_A, 1e-5)
    if resolve(method)[0].preserves_output:
        assert_gap(model(x), base(x), EPSILON[torch.float32])


@pytest.mark.parametrize("method", ["eva", "corda"])
@pytest.mark.parametrize("case", ["depthwise", "four", "dilated"])
def test_peft_and_ours_load_a_start_from_inputs(case, method, tmp_path):
    base = grouped(case)
    rank, x = base[0].groups, inputs(base)
    model = adapt(base, batches_of(base, method), r=rank, init_lora_weights=method)
    assert_gap(model(x), base(x), EPSILON[torch.float32])
    expected = train(model, size=0.2)(x)
    model.save_pretrained(tmp_path)
    assert_gap(LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), expected, 1e-6)
    if case != "dilated":  # PEFT does not dilate A
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert_gap(theirs(x), expected, 1e-5)


@pytest.mark.parametrize("method", ["corda", "sc_lora", "lora_da"])
def test_a_file_holds_the_moments_of_each_group(method, tmp_path):
    base = grouped("four")
    settings = {"r": 4, "init_lora_weights": method, "cache": False}
    config = LoraConfig(r=4, lora_alpha=9, target_modules=["0"], init_lora_weights=method)
    found = calibrate(base, config, batches_of(base, method))
    found.save(tmp_path / "found.safetensors")
    loaded = Calibration.load(tmp_path / "found.safetensors")
    layer = adapt(base, batches_of(base, method), **settings).layers["0"]
    again = adapt(base, loaded, **settings).layers["0"]
    assert torch.equal(layer.lora_A, again.lora_A)
    assert torch.equal(layer.lora_B, again.lora_B)
    other = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2))
    with pytest.raises(ValueError, match="'0' have 4 groups, the model's have 2"):
        adapt(other, loaded, **settings)


def test_passes_with_little_memory_find_the_same_start():
    base = nn.Sequential(*grouped("four"), nn.Conv2d(8, 8, 1, groups=2))
    batches = [inputs(base, seed) for seed in (1, 2)]
    settings = {"r": 4, "target_modules": ["0", "1"], "init_lora_weights": "eva", "cache": False}
    whole = adapt(base, batches, **settings)
    config = LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights="eva")
    plan = whole.plan
    memory = max(plan.input_bytes(target) for target in plan.targets)
    assert memory == 4 * sums_bytes(18, torch.float32)
    parts = get_peft_model(
        copy.deepcopy(base), config, calibration=batches, calibration_memory=memory, cache=False
    )
    for name, layer in whole.layers.items():
        assert torch.equal(layer.lora_A, parts.layers[name].lora_A)


@pytest.mark.parametrize("method", ["eva", "gora"])
def test_allocation_keeps_the_rank_of_groups(method):
    base = nn.Sequential(*grouped("four"), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))
    setting = EvaOptions(rho=2.0) if method == "eva" else method
    model = adapt(
        base, batches_of(base, method), r=4, target_modules=["0", "1", "2"],
        init_lora_weights=setting,
    )  # fmt: skip
    ranks = {target.name: target.rank for target in model.plan.targets}
    assert ranks["0"] == 4
    assert model.layers["0"].lora_A.shape[0] == 4
    assert ranks["1"] != 4
    assert "the groups of a convolution keep one rank for all, as planned" in str(model.plan)


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
        ("qera", 6, TypeError, "qera does not support, because it replaces the base weight"),
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
