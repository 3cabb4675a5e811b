"""Adapters on transposed convolutions, against a plain one with the merged kernel in float64."""

import copy

import pytest
import torch
from measures import EPSILON, assert_gap, train
from torch import nn

from lora_init import LoraConfig, LoraModel, WithLoss, calibrate, get_peft_model
from lora_init.weights.patches import CLASSES, TRANSPOSED

CASES = {
    "line": (1, {"stride": 2, "padding": 1, "output_padding": 1}),
    "picture": (2, {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2)}),
    "wide padding": (2, {"kernel_size": 2, "padding": 2, "bias": False}),
    "volume": (3, {"kernel_size": (1, 2, 3), "stride": (1, 2, 1)}),
}
every_case = pytest.mark.parametrize("case", CASES)


def upsampling(case):
    dimensions, settings = CASES[case]
    torch.manual_seed(0)
    return nn.Sequential(TRANSPOSED[dimensions](5, 7, **{"kernel_size": 3} | settings))


def inputs(base, seed=1):
    size = (2, 5, 6, 5, 4)[: base[0].weight.ndim]
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def adapt(base, calibration=None, **settings):
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["0"]} | settings)
    return get_peft_model(copy.deepcopy(base), config, calibration=calibration)


@every_case
@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_output_is_that_of_the_merged_kernel(case, settings):
    base = upsampling(case)
    x = inputs(base)
    model = adapt(base, **settings)
    assert_gap(model(x), base(x), EPSILON[torch.float32])
    layer = train(model, size=0.2).layers["0"]
    plain = copy.deepcopy(base[0]).double()
    with torch.no_grad():  # (out, channels, *kernel) from (out, in)
        kernel = layer.merged_weight().double().view(7, 5, *plain.kernel_size)
        plain.weight.copy_(kernel.transpose(0, 1))
    expected = plain(x.double())
    assert_gap(model(x), expected, 2 * EPSILON[torch.float32])
    assert_gap(model(x[0]), expected[0], 2 * EPSILON[torch.float32])
    assert_gap(layer.weight, plain.weight, EPSILON[torch.float32])
    with model.disable_adapter():
        assert_gap(model(x), base(x), EPSILON[torch.float32])
    merged = copy.deepcopy(model).merge_and_unload()
    assert_gap(merged(x), expected, 2 * EPSILON[torch.float32])
    assert_gap(model.unload()(x), base(x), EPSILON[torch.float32])


@pytest.mark.parametrize("kind", [*TRANSPOSED.values(), *CLASSES.values()])
def test_the_gradient_is_that_of_the_weight(kind):
    torch.manual_seed(0)
    base = nn.Sequential(kind(5, 7, 2, stride=2, padding=1))

    def loss(model, x):
        return model(x).sin().sum()

    batches = WithLoss([inputs(base, seed) for seed in (1, 2)], loss)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="lora_one")
    gradient = calibrate(base, config, batches).layers["0"].gradient
    for batch in batches.batches:
        (loss(base, batch) / 2).backward()
    found = base[0].weight.grad
    found = found.transpose(0, 1) if kind in TRANSPOSED.values() else found
    assert_gap(gradient, found.flatten(1), 1e-5)


@pytest.mark.parametrize("method", [True, "pissa"])
def test_the_file_is_for_ours_alone(method, tmp_path):
    base = upsampling("picture")
    x = inputs(base)
    model = train(adapt(base, init_lora_weights=method), size=0.2)
    with pytest.warns(UserWarning, match=r"PEFT has no adapter for transposed convolutions \('0'"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert_gap(LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x), 1e-6)


def test_groups_are_refused():
    base = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2))
    with pytest.raises(TypeError, match="'0' is a ConvTranspose2d with groups=2, which is not sup"):
        adapt(base)


def test_an_output_size_is_refused_by_name():
    """torch's optional second argument changes the geometry from call to call."""
    base = upsampling("line")
    with pytest.raises(TypeError, match="an adapted ConvTranspose1d takes one input"):
        adapt(base).layers["0"](inputs(base), output_size=[13])
