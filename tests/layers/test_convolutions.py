"""Adapters on convolutions against one with the merged kernel; calibration on patches."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measures import EPSILON, assert_gap, train
from models import spread_weight
from products import thinned
from torch import nn
from torch.nn import functional

from lora_init import LoraConfig, get_peft_model
from lora_init.calibration.collect import collect
from lora_init.registry import CalibrationRequest
from lora_init.weights.patches import CLASSES

GEOMETRIES = {
    "plain": (2, {}),
    "pointwise": (2, {"kernel_size": 1}),
    "padded": (2, {"padding": 1}),
    "uneven": (2, {"kernel_size": (3, 2), "padding": (2, 1), "stride": (1, 2)}),
    "dilated": (2, {"dilation": 2, "padding": (2, 0)}),
    "same": (2, {"padding": "same", "dilation": (1, 2)}),
    "valid": (2, {"padding": "valid", "stride": 2}),
    "reflect": (2, {"padding": (1, 2), "padding_mode": "reflect"}),
    "replicate": (2, {"padding": 2, "padding_mode": "replicate", "stride": (2, 1)}),
    "circular": (2, {"padding": (2, 1), "padding_mode": "circular", "dilation": (2, 1)}),
    "same reflect": (2, {"padding": "same", "padding_mode": "reflect", "kernel_size": (2, 3)}),
    "no bias": (2, {"bias": False, "padding": 1}),
    "line": (1, {"padding": 1, "stride": 2}),
    "line same reflect": (1, {"padding": "same", "padding_mode": "reflect", "dilation": 2}),
    "volume": (3, {"kernel_size": (2, 3, 1), "padding": (0, 1, 1), "stride": (1, 2, 1)}),
    "volume circular": (3, {"padding": 1, "padding_mode": "circular", "dilation": (1, 2, 1)}),
}
"""The number of dimensions and the settings, by name."""
SIZES = 9, 8, 5
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)


def convolution(dimensions=2, channels=3, out=7, **settings):
    settings = {"kernel_size": 3} | settings
    module = CLASSES[dimensions](channels, out, **settings)
    with torch.no_grad():
        module.weight.copy_(spread_weight(out, module.weight[0].numel()).view(module.weight.shape))
    return module


def of_geometry(name):
    dimensions, settings = GEOMETRIES[name]
    return convolution(dimensions, **settings)


def pictures(module, *batch):
    """Random inputs: pictures, or lines or volumes."""
    return torch.randn(*batch, module.in_channels, *SIZES[: module.weight.ndim - 2])


def adapt(base, *, calibration=None, **settings):
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["0"]} | settings)
    return get_peft_model(base, config, calibration=calibration)


@pytest.mark.parametrize(
    ("geometry", "method"),
    thinned(
        list(product(GEOMETRIES, [True, "random", "pissa", "olora", "loftq"])),
        lambda geometry, method: (geometry, method in ("pissa", "olora")),
        lambda geometry, method: method,
    ),
)
def test_output_is_the_dense_convolution(geometry, method):
    base = nn.Sequential(of_geometry(geometry))
    model = train(adapt(copy.deepcopy(base), init_lora_weights=method), size=0.2)
    layer = model.layers["0"]
    change = layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    kernel = layer.base_layer.weight.double() + change.view(base[0].weight.shape)
    dense = copy.deepcopy(base[0]).double()
    dense.weight = nn.Parameter(kernel.detach())
    for x in (pictures(base[0], 4), pictures(base[0])):  # a batch, and a single picture
        assert_gap(model(x), dense(x.double()), EPSILON[torch.float32])
    assert_gap(model.merge_and_unload()(x), dense(x.double()), EPSILON[torch.float32])


def along(dimensions, values):
    return st.tuples(*[values] * dimensions)


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_any_geometry(data, dimensions, channels, out):
    """PiSSA at full rank: the adapter holds all of W, so that any mistake of layout shows."""
    kernel = data.draw(along(dimensions, st.integers(1, 3)))
    module = convolution(
        dimensions, channels, out,
        kernel_size=kernel,
        stride=data.draw(along(dimensions, st.integers(1, 3))),
        dilation=data.draw(along(dimensions, st.integers(1, 2))),
        padding=data.draw(along(dimensions, st.integers(0, 2))),
        padding_mode=data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )  # fmt: skip
    base = nn.Sequential(module)
    rank = min(out, module.weight[0].numel())
    model = adapt(copy.deepcopy(base), r=rank, init_lora_weights="pissa")
    layer = model.layers["0"]
    assert layer.base_layer.weight.abs().max() <= 1e-5  # nearly nothing is left of it
    x = pictures(module, 2)
    assert_gap(model(x), base(x), 1e-5)


# -- calibration -----------------------------------------------------------------------------------


def patches(module, x):
    """The pixels under the kernel at each of its positions, cut out one by one: (positions, in)."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(x.double(), module._reversed_padding_repeated_twice, mode=mode)
    rows = []
    for picture in padded:
        for position in np.ndindex(*module(x).shape[2:]):
            indices = [
                place * stride + gap * torch.arange(size)
                for place, stride, gap, size in zip(
                    position, module.stride, module.dilation, module.kernel_size, strict=True
                )
            ]
            rows.append(picture[:, *torch.meshgrid(indices, indexing="ij")].flatten())
    return torch.stack(rows)


def assert_moments(statistics, rows):
    assert statistics.inputs.tokens == len(rows)
    assert_gap(statistics.inputs.mean, rows.mean(0), 1e-5)
    assert_gap(statistics.inputs.second_moment, rows.T @ rows / len(rows), 1e-5)


@every_geometry
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_statistics_are_of_the_patches(dtype, geometry):
    base = nn.Sequential(of_geometry(geometry)).to(dtype)
    batches = [pictures(base[0], 2).add(0.3).to(dtype) for _ in range(2)]
    found = collect(base, ["0"], CalibrationRequest(), batches).layers["0"]
    rows = torch.cat([patches(base[0], x) for x in batches])
    assert_moments(found, rows)
    # The definition: the unfolded weight times a patch is the output there.
    dense = copy.deepcopy(base[0]).double()
    output = dense(batches[0].double()).movedim(1, -1).flatten(0, -2)
    product = patches(base[0], batches[0]) @ dense.weight.flatten(1).T
    bias = 0 if dense.bias is None else dense.bias
    assert_gap(product + bias, output, 1e-12)


class TwoReaders(nn.Module):
    """Two convolutions of different geometry, and one of the first's, read one tensor."""

    def __init__(self):
        super().__init__()
        self.fine = convolution(kernel_size=3, padding=1)
        self.coarse = convolution(kernel_size=3, stride=2)
        self.twin = convolution(kernel_size=3, padding=1)

    def forward(self, x):
        return self.fine(x), self.coarse(x), self.twin(x)


def test_readers_of_one_tensor_keep_their_own_patches():
    base, x = TwoReaders(), torch.randn(3, 3, 9, 8) + 0.5
    names = ["fine", "coarse", "twin"]
    found = collect(base, names, CalibrationRequest(), [x]).layers
    for name in names:
        assert_moments(found[name], patches(base.get_submodule(name), x))
    assert found["twin"].inputs is found["fine"].inputs  # the same patches are summed once
