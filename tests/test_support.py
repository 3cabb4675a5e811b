"""Every cell of the support table."""

import pytest
import torch
from expert_mixture import Choice, Mixture, mixture_rows
from measures import assert_gap
from methods import behavior, handling
from models import Batches, data_of
from products import thinned
from quantized_layers import LAYERS, quantized_layer
from torch import nn
from transformers.pytorch_utils import Conv1D
from uniform import uniform

from lora_init import LoraConfig, get_peft_model, list_initializers
from lora_init.cli.support import bases, support
from lora_init.weights.kinds import FORMATS
from lora_init.weights.patches import TRANSPOSED

CELLS = [
    (spec, kind, base)
    for spec in list_initializers()
    for kind in FORMATS
    for base in bases(kind)
    if kind not in ("Experts", "Router")  # see test_a_cell_of_experts_or_routers_is_true
]


def likeness(kind):
    """Read-only formats differ in how they are read, which their own tests show.

    All convolutions share one implementation.
    """
    one = FORMATS[kind]
    if one.operation == "convolution":
        return one.operation
    return kind if one.writable else f"read-only, {'readable' if one.readable else 'opaque'}"


def one_module(kind, base):
    """A model of one module, its input, and the weight from before quantization."""
    torch.manual_seed(0)
    x = torch.randn(6, 64)
    if kind == "Conv1D":
        module = Conv1D(32, 64)
    elif kind == "Conv2d":
        module, x = nn.Conv2d(4, 32, 4), torch.randn(6, 4, 6, 6)
    elif kind == "Conv1d":
        module, x = nn.Conv1d(16, 32, 4), torch.randn(6, 16, 20)
    elif kind == "Conv3d":
        module, x = nn.Conv3d(8, 32, 2), torch.randn(6, 8, 4, 4, 3)
    elif "Transpose" in kind:
        dimensions = int(kind[-2])
        module = TRANSPOSED[dimensions](8, 32, 2)
        x = torch.randn(6, 8, *(5, 4, 3)[:dimensions])
    elif kind == "Embedding":
        module, x = nn.Embedding(48, 32), torch.arange(48)
    elif kind in LAYERS:
        module, columns = quantized_layer(kind)
        return nn.Sequential(module).eval(), torch.randn(6, columns), None
    else:
        module = nn.Linear(64, 32)
    weight = module.weight.detach().clone()
    if kind in ("Linear4bit", "Linear8bitLt"):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        if kind == "Linear4bit":
            packed = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", compress_statistics=True)
        else:
            packed = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
        packed.load_state_dict(module.state_dict())
        module = packed.to("cpu")
        FORMATS[kind].keep_plain(module)
    model = nn.Sequential(module)
    if base == "16 bits":
        model, x = model.bfloat16(), x if kind == "Embedding" else x.bfloat16()
    return model.eval(), x, weight


@pytest.mark.parametrize(
    ("spec", "kind", "base", "use_dora"),
    thinned(
        [
            pytest.param(spec, kind, base, dora, id=f"{spec.name}-{kind}-{base}{'-dora' * dora}")
            for spec, kind, base in CELLS
            for dora in (False, True)
        ],
        lambda spec, kind, base, dora: spec.name,
        lambda spec, kind, base, dora: (spec.base, kind),
        lambda spec, kind, base, dora: (kind, base),
        lambda spec, kind, base, dora: (behavior(spec.name), likeness(kind)),
        lambda spec, kind, base, dora: (handling(spec.name), spec.operations, likeness(kind), base),
        lambda spec, kind, base, dora: (handling(spec.name), likeness(kind), dora),
    ),
)
def test_a_cell_is_true(spec, kind, base, use_dora):
    model, x, original = one_module(kind, base)
    settings = uniform(spec.name)
    config = LoraConfig(
        r=4,
        target_modules=["0"],
        init_lora_weights={"name": spec.name, **settings},
        use_dora=use_dora,
    )
    promised = support(spec, kind, base, use_dora=use_dora)
    calibration = None if kind == "Embedding" else data_of(spec, Batches([x]))
    if promised is None:
        cause = "use_dora" if support(spec, kind, base) else spec.name
        reason = f"({cause} does not support|cannot be (written|read).*{cause})"
        with pytest.raises(TypeError, match=rf"'0' is an? .*{reason}"):
            get_peft_model(model, config, calibration=calibration)
        return
    with torch.no_grad():
        expected = one_module(kind, base)[0](x)
    weights = None
    if promised == "replaced*":
        with pytest.raises(ValueError, match=r"'0' is quantized already.*original_weights"):
            get_peft_model(model, config, calibration=calibration)
        weights = {"0.weight": original}
    adapted = get_peft_model(model, config, calibration=calibration, original_weights=weights)
    layer = adapted.layers["0"]
    assert layer.base_state == promised.rstrip("*").replace(" ", "_")
    actual = adapted(x)
    assert actual.dtype == expected.dtype
    if spec.preserves_output:
        epsilon = torch.finfo(torch.bfloat16).eps if base == "16 bits" else 3e-6
        assert_gap(actual, expected, epsilon)
    actual.float().pow(2).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in adapted.parameters())


@pytest.mark.parametrize(
    ("spec", "kind", "base", "use_dora"),
    thinned(
        [
            pytest.param(spec, kind, base, dora, id=f"{spec.name}-{kind}-{base}{'-dora' * dora}")
            for spec in list_initializers()
            for kind in ("Experts", "Router")
            for base in bases(kind)
            for dora in (False, True)
            if "target_weight" not in spec.reads
        ],
        lambda spec, kind, base, dora: (spec.base, kind, base, dora),
        lambda spec, kind, base, dora: ("output_moments" in spec.reads, kind, dora),
    ),
)
def test_a_cell_of_experts_or_routers_is_true(spec, kind, base, use_dora):
    dtype = torch.float32 if base == "float32" else torch.bfloat16
    model, parameter = (
        (Mixture(), "experts.down_proj") if kind == "Experts" else (Choice(), "gate.weight")
    )
    model = model.to(dtype)
    rows = [batch.to(dtype) for batch in mixture_rows()]
    config = LoraConfig(
        r=2,
        target_parameters=[parameter],
        init_lora_weights={"name": spec.name, **uniform(spec.name)},
        use_dora=use_dora,
    )
    promised = support(spec, kind, base, use_dora=use_dora)
    calibration = data_of(spec, Batches(rows))
    if promised is None:
        with pytest.raises((TypeError, ValueError), match="does not support|use_dora"):
            get_peft_model(model, config, calibration=calibration)
        return
    with torch.no_grad():
        expected = model(rows[0])
    adapted = get_peft_model(model, config, calibration=calibration)
    layer = adapted.layers[parameter.removesuffix(".weight")]
    assert layer.base_state == promised.replace(" ", "_")
    if spec.preserves_output:
        assert_gap(
            adapted(rows[0]), expected, torch.finfo(dtype).eps if base != "float32" else 3e-6
        )
