"""Every cell of the support table."""

import pytest
import torch
from expert_mixture import Choice, Mixture, mixture_rows
from format_examples import example
from measures import assert_gap
from methods import behavior, handling
from models import Batches, data_of
from products import thinned
from torch import nn
from uniform import uniform

from lora_init import LoraConfig, get_peft_model, list_initializers
from lora_init.cli.support import bases, support
from lora_init.weights.kinds import FORMATS

CELLS = [
    (spec, kind, base) for spec in list_initializers() for kind in FORMATS for base in bases(kind)
]
OF_MIXTURES = ("routed", "selection")
"""The operations of modules that only a model of experts has."""


def cells(*, of_mixtures):
    """Each cell of the table, with and without DoRA."""
    return [
        pytest.param(spec, kind, base, dora, id=f"{spec.name}-{kind}-{base}{'-dora' * dora}")
        for spec, kind, base in CELLS
        for dora in (False, True)
        if (FORMATS[kind].operation in OF_MIXTURES) == of_mixtures
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
    """A model of one module, and its input."""
    module, x = example(kind)
    FORMATS[kind].keep_plain(module)
    model = nn.Sequential(module)
    if base == "16 bits":
        model, x = model.bfloat16(), x if kind == "Embedding" else x.bfloat16()
    return model.eval(), x


@pytest.mark.parametrize(
    ("spec", "kind", "base", "use_dora"),
    thinned(
        cells(of_mixtures=False),
        lambda spec, kind, base, dora: spec.name,
        lambda spec, kind, base, dora: (spec.base, kind),
        lambda spec, kind, base, dora: (kind, base),
        lambda spec, kind, base, dora: (behavior(spec.name), likeness(kind)),
        lambda spec, kind, base, dora: (handling(spec.name), spec.operations, likeness(kind), base),
        lambda spec, kind, base, dora: (handling(spec.name), likeness(kind), dora),
    ),
)
def test_a_cell_is_true(spec, kind, base, use_dora):
    model, x = one_module(kind, base)
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
        read = FORMATS[kind].read(model[0])
        weights = {"0.weight": read + 0.02 * torch.randn(read.shape)}
    adapted = get_peft_model(model, config, calibration=calibration, original_weights=weights)
    layer = adapted.layers["0"]
    assert adapted.plan.targets[0].module_type == kind
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
        cells(of_mixtures=True),
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
    assert adapted.plan.targets[0].module_type == kind
    assert layer.base_state == promised.replace(" ", "_")
    if spec.preserves_output:
        assert_gap(
            adapted(rows[0]), expected, torch.finfo(dtype).eps if base != "float32" else 3e-6
        )
