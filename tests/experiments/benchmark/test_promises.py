"""What a plan says that an initializer holds, beside what the kernel says that it held."""

import pytest
import torch
from torch import nn

import lora_init
from experiments.benchmark.peaks import MIB, handing_back, peak_watch
from lora_init import LoraConfig, get_peft_model

KPM = {"name": "corda", "corda_method": "kpm"}


def call(method, rows, columns):
    """The plan, and the bytes that the call took at its peak."""
    base = nn.Sequential(nn.Linear(columns, rows, bias=False))
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=method)
    plan = get_peft_model(base, config, dry_run=True)
    found = None
    if plan.calibration is not None:
        inputs = torch.randn(2048, columns) * torch.linspace(0.1, 1, columns)
        found = lora_init.calibrate(base, config, [inputs])
    with handing_back():
        watch = peak_watch(torch.device("cpu"))
        adapted = get_peft_model(base, config, calibration=found)
        taken = watch.rise()
    del adapted
    return plan, taken


@pytest.mark.parametrize("method", ["pissa", "corda", KPM, "mica", "loftq", "eva"], ids=str)
def test_a_call_takes_what_its_plan_says(method):
    call(method, 96, 96)  # loads code, and buffers that have nothing to do with a layer's size
    for rows, columns in ((1536, 768), (768, 1536)):
        plan, taken = call(method, rows, columns)
        promised = plan.factor_bytes + plan.workspace_bytes
        assert 0.3 * promised < taken < 1.05 * promised + MIB
