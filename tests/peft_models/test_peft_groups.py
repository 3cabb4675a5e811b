"""Grouped and depthwise convolutions in PEFT models.

PEFT's A of such a layer reads the channels of all groups, and its B has one block per group.
"""

import copy

import peft
import pytest
import torch
from measures import EPSILON, assert_gap, relative_gap, train
from torch import nn

from lora_init import (
    LoraConfig,
    LoraModel,
    get_peft_model,
    initialize_peft_model,
    load_peft_checkpoint,
    restore_peft_model,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
]

MODULES = {
    "grouped": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, stride=2, groups=4, bias=False),
    "pointwise": lambda: nn.Conv1d(8, 12, 1, groups=4),
}
EXACT = EPSILON[torch.float32]


def network(kind, dtype=torch.float32):
    torch.manual_seed(0)
    conv = MODULES[kind]()
    sizes = (9,) * (conv.weight.ndim - 2)
    x = torch.randn(3, conv.in_channels, *sizes).to(dtype)
    return nn.Sequential(conv).to(dtype).eval(), x


def wrapped(base, **settings):
    settings = {"r": 8, "lora_alpha": 12, "target_modules": ["0"]} | settings
    return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["pissa", "kaiming", "corda", "eva"])
@pytest.mark.parametrize("kind", MODULES)
def test_a_start_from_step_0_to_a_file(kind, method, dtype, tmp_path):
    base, x = network(kind, dtype)
    model, expected = wrapped(base), base(x)
    exact = EXACT if dtype == torch.float32 else 0.0
    initialize_peft_model(model, method, calibration=[x] if method in ("corda", "eva") else None)
    assert_gap(model(x), expected, exact)
    trained = train(model)(x)
    assert relative_gap(trained, expected) > 1e-3
    with model.disable_adapter():
        assert_gap(model(x), expected, exact)
    model.save_pretrained(tmp_path)
    doubled = {"r": 16, "lora_alpha": 24} if method in ("pissa", "corda") else {}
    close = 2 * max(EPSILON[dtype], 1e-5)
    plain = wrapped(base, **doubled)
    plain.load_state_dict(model.state_dict())
    for loaded in (plain, peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()):
        assert_gap(loaded(x), trained, close)
    resumed = wrapped(base)
    load_peft_checkpoint(resumed, tmp_path)
    ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for loaded in (resumed, ours):
        assert_gap(loaded(x), trained, close)
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_adapter()
    restore_peft_model(model)
    assert_gap(model(x), expected, exact)


def test_the_start_is_that_of_get_peft_model():
    base, _ = network("grouped")
    config = LoraConfig(r=8, lora_alpha=12, target_modules=["0"], init_lora_weights="pissa")
    ours = get_peft_model(copy.deepcopy(base), config)
    model = wrapped(base)
    report = initialize_peft_model(model, "pissa")
    lora_A, lora_B = (getattr(model.base_model.model[0], f"lora_{x}")["default"] for x in "AB")
    halves = lora_A.weight.view(2, 4, 2, 36)
    assert not halves[0, :, 1].any()
    assert not halves[1, :, 0].any()
    layer = ours.layers["0"]
    assert_gap(torch.cat([halves[0, :, 0], halves[1, :, 1]]), layer.lora_A, 1e-6)
    assert_gap(lora_B.weight.flatten(1), layer.lora_B, 1e-6)
    captured = 0.0
    for part in base[0].weight.detach().double().flatten(1).chunk(2):
        captured += torch.linalg.svdvals(part)[:4].square().sum()
    expected = float(captured / base[0].weight.double().square().sum())
    for row in (report.layers[0], ours.init_report().layers[0]):
        assert row.captured_energy == pytest.approx(expected, rel=1e-5)


def test_what_peft_cannot_compute_is_refused_by_name():
    base, _ = network("grouped")
    with pytest.raises(TypeError, match="use_dora=True is not supported for '0'.*groups=2"):
        initialize_peft_model(wrapped(base, use_dora=True), "pissa")
    model = wrapped(base)
    initialize_peft_model(model, "pissa")
    with pytest.raises(NotImplementedError, match="get_delta_weight is not supported.*groups=2"):
        model.base_model.model[0].get_delta_weight("default")


def test_peft_has_no_layer_for_transposed_convolutions():
    """If this fails, PEFT supports them and `initialize_peft_model` can."""
    with pytest.raises(ValueError, match="ConvTranspose2d.*is not supported"):
        wrapped(nn.Sequential(nn.ConvTranspose2d(8, 6, 3)))
    line = nn.Sequential(nn.ConvTranspose1d(8, 6, 3))
    parameter = wrapped(line, target_modules=None, target_parameters=["0.weight"])
    with pytest.raises(TypeError, match="'0' is the weight of a ConvTranspose1d in PEFT's"):
        initialize_peft_model(parameter, "pissa")
