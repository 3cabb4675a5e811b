"""The contract of the weight format of mixture-of-experts modules."""

import copy

import pytest
import torch
from expert_modules import CLASSES, EXPERTS, HIDDEN, WIDTH, OwnExperts, experts
from torch import nn

from lora_init.weights.kinds import FORMATS, class_format, is_linear, known_format, weight_format

every_layout = pytest.mark.parametrize("layout", CLASSES)
FORMAT = FORMATS["Experts"]
TRANSPOSED = ("interleaved, transposed, biased", "all tokens")


def matrices():
    pairs = [(layout, name) for layout in CLASSES for name in FORMAT.matrices(experts(layout))]
    return pytest.mark.parametrize(("layout", "name"), pairs)


@every_layout
def test_experts_are_recognized_by_their_parameters(layout):
    module = experts(layout)
    assert weight_format(module) is class_format(module) is known_format(module) is FORMAT
    assert FORMAT.refusal(module) is FORMAT.replaced_forward(module) is None
    assert FORMAT.unreadable(module) is FORMAT.quantizer(module) is None
    assert FORMAT.describe(module.bfloat16()) == "bfloat16"
    assert not is_linear(module)  # "all-linear" does not select them


@every_layout
def test_the_shapes_are_those_of_products_also_on_the_meta_device(layout):
    first = WIDTH if layout == "no gate" else 2 * WIDTH
    expected = [(EXPERTS, first, HIDDEN), (EXPERTS, HIDDEN, WIDTH)]
    for module in (experts(layout), experts(layout).to("meta")):
        names = FORMAT.matrices(module)
        assert names == ("up_proj" if layout == "no gate" else "gate_up_proj", "down_proj")
        assert [FORMAT.shape(module, name) for name in names] == expected


@matrices()
def test_reading_gives_a_view_in_the_layout_of_products(layout, name):
    module = experts(layout)
    stored, matrix = getattr(module, name), FORMAT.read(module, name)
    assert torch.equal(matrix, stored.transpose(1, 2) if layout in TRANSPOSED else stored)
    assert matrix.data_ptr() == stored.data_ptr()
    assert not matrix.requires_grad
    assert torch.equal(FORMAT.stored(module, matrix), stored)
    with pytest.raises(TypeError, match="depends on the module"):
        FORMAT.orient(stored)


@matrices()
@pytest.mark.parametrize("on_cpu", [False, True])
def test_what_is_written_is_read_and_what_was_held_comes_back(layout, name, on_cpu):
    module = experts(layout)
    parameter, before = getattr(module, name), copy.deepcopy(module.state_dict())
    memory, former = parameter.data, parameter.data.clone()
    held = FORMAT.hold(module, name, on_cpu=on_cpu)
    matrix = torch.randn(FORMAT.shape(module, name), dtype=torch.float64)
    for own in (False, True):
        FORMAT.write(module, matrix, name, own=own)
        assert torch.equal(FORMAT.read(module, name), matrix.float())
        assert (getattr(module, name) is parameter) != own
        assert torch.equal(memory, former)
        FORMAT.put_back(module, held)
        assert getattr(module, name) is parameter
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[key]), key


def parallel(module):
    module._is_expert_parallel = True


def in_float8(module):
    module.down_proj = nn.Parameter(module.down_proj.to(torch.float8_e4m3fn), requires_grad=False)


def partitioned(module):
    module.gate_up_proj.ds_id = 0


def other_implementation(module):
    module.config._experts_implementation = "sonicmoe"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (parallel, "whose experts are distributed over processes"),
        (in_float8, "whose down_proj has dtype torch.float8_e4m3fn"),
        (partitioned, "whose gate_up_proj is partitioned by DeepSpeed"),
        (
            other_implementation,
            "experts_implementation='sonicmoe' is not supported: must be one of",
        ),
    ],
)
def test_experts_that_cannot_be_adapted_are_refused_with_the_reason(change, reason):
    module = experts("concatenated")
    change(module)
    assert reason in FORMAT.refusal(module)
    assert class_format(module) is FORMAT
    assert weight_format(module) is None


def test_experts_of_an_unknown_function_are_refused():
    assert "must declare their layout" in FORMAT.refusal(OwnExperts())
    module = experts("concatenated")
    module.forward = lambda *args: args[0]
    assert FORMAT.replaced_forward(module) is not None


@pytest.mark.parametrize("ndim", [2, 4])
def test_other_parameters_of_these_names_are_no_experts(ndim):
    module = OwnExperts()
    module.down_proj = nn.Parameter(torch.zeros([EXPERTS] * ndim))
    assert class_format(module) is None
