"""The contract of a weight format, for every format of modules with one `weight`.

A new format needs an example: a file in the folder `format_examples`.
"""

import copy
import sys

import pytest
import torch
from format_examples import EXAMPLES, example
from format_examples.float_modules import draws
from torch import nn

import lora_init.weights
from lora_init import LoraConfig, get_peft_model
from lora_init.entry_points import import_modules
from lora_init.weights.format import WeightFormat
from lora_init.weights.kinds import (
    FORMATS,
    class_format,
    known_format,
    module_type,
    register_weight_format,
    weight_format,
    weight_formats,
)
from lora_init.weights.linear import LinearFormat
from lora_init.weights.read_only import ReadOnlyFormat

KINDS = [name for name in EXAMPLES if name in FORMATS]  # without variants


def made(name):
    return example(name)[0]


def unload(module):
    module.weight = nn.Parameter(module.weight.data.to("meta"), requires_grad=False)
    return module


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same_state(module, expected):
    found = module.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


@pytest.fixture
def own_formats():
    before = dict(FORMATS)
    yield
    FORMATS.clear()
    FORMATS.update(before)


every_format = pytest.mark.parametrize("name", KINDS)
writable_formats = pytest.mark.parametrize("name", [n for n in KINDS if FORMATS[n].writable])
"""Those that are not, `test_read_only.py` tests."""


def test_every_format_has_an_example():
    # test_experts_format.py has several modules of experts.
    missing = [n for n, one in FORMATS.items() if n not in KINDS and one.operation != "routed"]
    assert not missing, "add a file with EXAMPLES to tests/support/format_examples"
    assert {kind.split()[0] for kind in EXAMPLES} <= set(FORMATS)


@every_format
def test_a_module_has_one_format(name):
    module, one = made(name), FORMATS[name]
    assert weight_format(module) is class_format(module) is known_format(module) is one
    assert (one.name, module_type(module)) == (name, name)
    assert one.refusal(module) is one.unreadable(module) is one.replaced_forward(module) is None


@writable_formats
def test_the_dtype_does_not_decide(name):
    module = made(name)
    module.weight = nn.Parameter(module.weight.detach().to(torch.uint8), requires_grad=False)
    assert class_format(module) is FORMATS[name]
    assert class_format(nn.LayerNorm(4)) is None
    with pytest.raises(TypeError, match="LayerNorm is not supported: must be one of Linear, "):
        known_format(nn.LayerNorm(4))


@every_format
def test_the_declared_subtractions_fit_the_storage(name):
    one = FORMATS[name]
    assert ("edit" in one.subtractions) != (one.quantized or one.operation == "selection")
    assert ("requantize" in one.subtractions) <= one.quantized
    assert "in_forward" in one.subtractions


@writable_formats
def test_reading_gives_the_stated_shape_and_dtype(name):
    module, one = made(name), FORMATS[name]
    assert one.matrices(module) == ("weight",)
    matrix = one.read(module, "weight")
    assert tuple(matrix.shape) == one.shape(module, "weight")
    assert matrix.dtype == torch.float32
    assert not matrix.requires_grad
    if not one.quantized:
        if "Transpose" not in name:
            assert matrix.data_ptr() == module.weight.data_ptr()  # a view, not a copy
        assert one.read(module.bfloat16()).dtype == one.float_dtype(module) == torch.bfloat16
        assert one.describe(module) == "bfloat16"
        assert one.quantizer(module) is None


@writable_formats
def test_the_shape_is_known_on_the_meta_device(name):
    module, one = made(name), FORMATS[name]
    expected = one.shape(module)
    unload(module)
    assert one.shape(module) == expected
    assert class_format(module) is one


@writable_formats
@torch.no_grad()
def test_the_matrix_times_the_rows_of_the_input_is_the_output(name):
    (module, x), one = example(name), FORMATS[name]
    bias = getattr(module, "bias", None)
    output = one.output_rows(module, module(x)) - (0 if bias is None else bias)
    product = one.input_rows(module, x).double() @ one.read(module).double().T
    # Linear8bitLt rounds its inputs to 8 bits.
    bound = 0.02 if name == "Linear8bitLt" else 2e-6
    assert output.shape == product.shape
    assert torch.linalg.norm(output - product) <= bound * torch.linalg.norm(product)


@writable_formats
def test_modules_that_cut_their_inputs_alike_have_equal_keys(name):
    (module, x), one = example(name), FORMATS[name]
    twin = copy.deepcopy(module)
    assert one.reading(module) == one.reading(twin)
    assert torch.equal(one.input_rows(module, x), one.input_rows(twin, x))
    if one.operation == "convolution":
        twin.stride = tuple(step + 1 for step in twin.stride)
        assert one.reading(module) != one.reading(twin)


@writable_formats
def test_what_is_written_is_read(name):
    module, one = made(name), FORMATS[name]
    matrix = draws(*one.shape(module), seed=2)
    parameter, memory = module.weight, module.weight.data
    former = memory.clone()
    one.write(module, matrix.double(), "weight")
    quantizer = one.quantizer(module)
    expected = matrix if quantizer is None else quantizer.roundtrip(matrix)
    assert torch.equal(one.read(module, "weight"), expected)
    assert torch.equal(one.orient(one.stored(module, matrix)), matrix)
    assert torch.equal(memory, former)  # the old memory may be mapped from a file
    if not one.quantized:
        assert module.weight is parameter
        one.write(module, matrix, own=True)
        assert module.weight is not parameter
        assert module.weight.shape == parameter.shape


@writable_formats
@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_held_weight_comes_back_exactly(name, on_cpu):
    (module, x), one = example(name), FORMATS[name]
    before, parameter = state(module), module.weight
    expected = one.read(module).clone()
    output = copy.deepcopy(module)(x)
    held = one.hold(module, "weight", on_cpu=on_cpu)
    for seed in (3, 4):  # what was held can be put back twice
        one.write(module, draws(*one.shape(module), seed=seed), own=True)
        module(x)
        one.put_back(module, held)
        assert module.weight is parameter
        assert torch.equal(one.read(module), expected)
        assert_same_state(module, before)
        assert torch.equal(copy.deepcopy(module)(x), output)


@writable_formats
def test_only_declared_formats_change_in_the_forward_pass(name):
    (module, x), one = example(name), FORMATS[name]
    assert one.changes_in_forward(module) <= one.quantized
    one.keep_plain(module)
    before, matrix = state(module), one.read(module).clone()
    module.eval()(x)
    assert torch.equal(one.read(module), matrix)
    assert_same_state(module, before)


@pytest.mark.parametrize("name", ["Linear4bit", "Linear8bitLt"])
def test_a_weight_that_cannot_be_read_has_a_reason(name):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    settings = {"has_fp16_weights": False} if name == "Linear8bitLt" else {}
    module = getattr(bitsandbytes.nn, name)(64, 32, **settings)
    assert "holds no quantized weight; move it" in FORMATS[name].unreadable(module)
    with pytest.raises(ValueError, match="holds no quantized weight; move it"):
        FORMATS[name].read(module)
    assert "on the meta device" in FORMATS[name].unreadable(unload(module))


def test_the_format_that_was_added_last_has_precedence(own_formats):
    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    class HalvedFormat(LinearFormat):
        name = "Halved"
        cls = Halved

        def read(self, module, name="weight"):
            return super().read(module, name) / 2

    module = Halved(4, 3, bias=False)
    assert class_format(module).name == "Linear"
    assert weight_format(module) is None  # because of its own forward
    register_weight_format(HalvedFormat())
    assert weight_format(module).name == module_type(module) == "Halved"
    assert weight_format(nn.Linear(4, 3)).name == "Linear"
    with pytest.raises(
        ValueError,
        match="name='Halved' of .*a new name, because HalvedFormat has",
    ):
        register_weight_format(HalvedFormat())
    x = draws(5, 4)
    torch.testing.assert_close(module(x), x @ weight_format(module).read(module).T)


def test_a_new_format_must_say_how_it_reads_and_writes():
    with pytest.raises(TypeError, match="abstract"):
        WeightFormat()


PLUGIN = """
from torch import nn

from lora_init import register_weight_format
from lora_init.weights.float import FloatFormat


class KernelLinear(nn.Module):
    def __init__(self, columns, rows):
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(nn.Linear(rows, columns).weight.detach()))

    def forward(self, x):
        return x @ self.weight


class KernelLinearFormat(FloatFormat):
    name = "KernelLinear"
    cls = KernelLinear
    transposed = True


register_weight_format(KernelLinearFormat())
"""


def test_a_file_of_the_package_needs_no_other_edit(own_formats, tmp_path, monkeypatch):
    (tmp_path / "kernel_linear.py").write_text(PLUGIN)
    monkeypatch.setattr(lora_init.weights, "__path__", [str(tmp_path)])
    import_modules("lora_init.weights")
    kernel_linear = sys.modules.pop("lora_init.weights.kernel_linear")
    assert module_type(kernel_linear.KernelLinear(4, 3)) == "KernelLinear"


@pytest.mark.parametrize("method", ["kaiming", "pissa"])
def test_an_entry_point_adds_a_format_that_methods_support(
    own_formats, tmp_path, monkeypatch, method
):
    (tmp_path / "kernel_linear.py").write_text(PLUGIN)
    info = tmp_path / "kernel_linear-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernel-linear\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lora_init.weight_formats]\nkernel = kernel_linear\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernel_linear", raising=False)
    monkeypatch.setattr("lora_init.weights.format._ENTRY_POINTS.loaded", False)
    assert "KernelLinear" in weight_formats()
    model = nn.Sequential(sys.modules["kernel_linear"].KernelLinear(16, 8))
    x = draws(4, 16)
    expected = model(x)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=method)
    adapted = get_peft_model(model, config)
    assert adapted.layers["0"].module_type == "KernelLinear"
    torch.testing.assert_close(adapted(x), expected)
    torch.testing.assert_close(adapted.merge_and_unload()(x), expected)


class Unknown(LinearFormat):
    name = "Unknown"
    operation = "sum"


class Unnamed(ReadOnlyFormat):
    def matches(self, module):
        return type(module) is Packed

    def values(self, module):
        return None


class Undecided(Unnamed):
    name = "Undecided"
    subtractions = ("somehow",)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Unknown, "must be an instance"),
        (Unknown(), "operation='sum' of .* Unknown is not supported: must be one of product"),
        (Unnamed(), "name=None of .* Unnamed is not supported: must be the name of"),
        (Undecided(), r"subtractions=\('somehow',\) of .* Undecided .* some of edit, in_forward"),
    ],
)
def test_a_wrong_format_is_refused_by_name(own_formats, one, message):
    before = set(weight_formats())
    with pytest.raises((TypeError, ValueError), match=message):
        register_weight_format(one)
    assert set(weight_formats()) == before


class Packed(nn.Module):
    """A linear layer that does not store its sizes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.ones(8, 16, dtype=torch.int8))

    def forward(self, x):
        return x @ self.codes.float().T


BASE = {"name": "Broken", "float_dtype": lambda self, module: torch.float32,
        "shape": lambda self, module, name="weight": (8, 16)}  # fmt: skip
MISTAKES = {
    "matches": (lambda self, module: None, "returned None", "True or False, for every module"),
    "matches ": (
        lambda self, module: module.bits == 4,
        "raised AttributeError .*'bits'",
        "True or",
    ),
    "refusal": (lambda self, module: True, "returned True", "the reason as text, or None"),
    "shape": (lambda self, module, name="weight": [8, 16], "returned .8, 16.", "a tuple of int"),
    "shape ": (ReadOnlyFormat.shape, "raised AttributeError .*'out_features'", "a tuple of int"),
    "float_dtype": (lambda self, module: "int4", "returned 'int4'", "a torch.dtype"),
    "float_dtype ": (WeightFormat.float_dtype, "raised AttributeError .*'weight'", "a torch.dtype"),
    "describe": (lambda self, module: None, "returned None", "a text"),
    "matrices": (lambda self, module: "weight", "returned 'weight'", "the names of the matrices"),
    "values": (lambda self, module: None, "returned None", "a floating-point tensor, .out, in."),
    "values ": (
        lambda self, module: module.codes,
        "returned a torch.int8 tensor of shape",
        "a flo",
    ),
}


@pytest.mark.wrong_types
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_function_that_breaks_the_contract_is_named_at_its_first_use(own_formats, mistake):
    name, (function, what, must) = mistake.strip(), MISTAKES[mistake]
    broken = type("Broken", (Unnamed,), BASE | {name: function})
    register_weight_format(broken())
    model = nn.Sequential(Packed())
    before = model[0]
    what = rf"Broken\.{name}\(\w+\) {what}.*: must return {must}.*\. Correct {name} in Broken"
    message = f"weight format 'Broken' is not supported: {what}"
    with pytest.raises(TypeError, match=message):
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    assert model[0] is before


def test_a_module_that_is_changed_in_place_is_recognized_again():
    module = nn.Module()
    assert class_format(module) is None
    for name, shape in (("gate_up_proj", (2, 8, 4)), ("down_proj", (2, 4, 4))):
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    assert class_format(module).name == "Experts"
    module.down_proj = nn.Parameter(torch.zeros(3, 4, 4))
    assert class_format(module) is None
