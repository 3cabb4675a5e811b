"""nn.MultiheadAttention in PEFT models.

PEFT merges both projections for each forward pass, the output projection twice.
"""

import copy

import peft
import pytest
import torch
from measures import EPSILON, assert_gap, assert_unchanged, relative_gap, snapshot, train
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
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
    pytest.mark.filterwarnings("ignore:A(ll adapters are already merged|lready unmerged)"),
]


class Mixer(nn.Module):
    """Cross-attention between two sequences, then a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 16)
        nn.init.normal_(self.attn.in_proj_bias, std=0.3)

    def forward(self, x, memory):
        return self.head(self.attn(x, memory, memory, need_weights=False)[0])


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, size, 16, generator=generator).to(dtype) for size in (5, 7)]


def wrapped(base, **settings):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["attn", "head"]} | settings
    return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()


def data_of(method):
    x, memory = inputs()
    return [{"x": x, "memory": memory}] if method in ("eva", "corda") else None


@pytest.mark.filterwarnings("error:.*layers were not used")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["pissa", "kaiming"])
def test_a_start_from_step_0_to_a_file(method, dtype, tmp_path):
    base, x = Mixer().to(dtype).eval(), inputs(dtype)
    model, expected = wrapped(base), base(*x)
    exact = EPSILON[torch.float32] if dtype == torch.float32 else EPSILON[dtype]
    report = initialize_peft_model(model, method)
    assert [row.name for row in report.layers] == ["attn.in_proj", "attn.out_proj", "head"]
    assert_gap(model(*x), expected, exact)
    assert type(base.attn) is nn.MultiheadAttention
    model(*x).float().square().sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)
    model.zero_grad()
    trained = train(model, size=0.3)(*x)
    assert relative_gap(trained, expected) > 4 * exact
    with model.disable_adapter():
        assert_gap(model(*x), expected, exact)
    model.save_pretrained(tmp_path)
    doubled = {"r": 8, "lora_alpha": 12} if method == "pissa" else {}
    close = 4 * EPSILON[dtype] if dtype.itemsize == 2 else 1e-5
    plain = wrapped(base, **doubled)
    plain.load_state_dict(model.state_dict())
    resumed = wrapped(base)
    load_peft_checkpoint(resumed, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for loaded in (plain, resumed, theirs, ours, copy.deepcopy(model).merge_and_unload()):
        assert_gap(loaded(*x), trained, close)
    model.merge_adapter()
    assert_gap(model(*x), trained, close)
    model.unmerge_adapter()
    assert_gap(model(*x), trained, close)
    restore_peft_model(model)
    assert_gap(model(*x), expected, exact)


@pytest.mark.parametrize("method", ["pissa", "corda", "eva"])
def test_the_start_is_that_of_get_peft_model(method):
    base = Mixer().eval()
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["attn", "head"], rank_pattern={"attn": 2},
        init_lora_weights={"name": method} | ({"rho": 1.0} if method == "eva" else {}),
    )  # fmt: skip
    ours = get_peft_model(copy.deepcopy(base), config, calibration=data_of(method))
    model = wrapped(base, rank_pattern={"attn": 2})
    options = {"rho": 1.0} if method == "eva" else None
    initialize_peft_model(model, method, options=options, calibration=data_of(method))
    attention = model.base_model.model.attn
    layers = {"attn.in_proj": attention, "attn.out_proj": attention.base_layer.out_proj}
    for name, layer in layers.items():
        twice = 2 if name == "attn.out_proj" else 1
        assert_gap(layer.lora_A["default"].weight, ours.layers[name].lora_A, 1e-6)
        if method != "eva":
            assert_gap(twice * layer.lora_B["default"].weight, ours.layers[name].lora_B, 1e-6)
    assert_gap(model(*inputs()), base(*inputs()), 1e-5)


def test_two_adapters_on_a_subtracted_base():
    base, x = Mixer().eval(), inputs()
    model = wrapped(base)
    initialize_peft_model(model, "pissa")
    model.add_adapter("second", model.peft_config["default"])
    expected = train(model)(*x)
    model.merge_adapter(["default"])
    assert_gap(model(*x), expected, 1e-5)
    model.unmerge_adapter()
    model.base_model.set_adapter(["default", "second"])
    both = model(*x)
    model.merge_adapter(["second", "default"])
    assert_gap(model(*x), both, 1e-5)
    model.unmerge_adapter()
    assert_gap(model(*x), both, 1e-5)


def test_what_peft_cannot_hold_is_refused_by_name():
    base = Mixer()
    model = wrapped(base)
    before = snapshot(model)
    with pytest.raises(ValueError, match="loftq.*not supported for 'attn.in_proj'.*an attention"):
        initialize_peft_model(model, "loftq")
    assert_unchanged(model, before)

    class Own(nn.MultiheadAttention):
        pass

    base.attn = Own(16, 4)
    with pytest.raises(TypeError, match="'attn' is a Own, a subclass of nn.MultiheadAttention"):
        initialize_peft_model(wrapped(base), "pissa")
