"""Adapters, checkpoints and calibrations that commit 1d1a888 wrote load and compute the same."""

from __future__ import annotations

import functools

import golden_networks as golden
import pytest
import torch

from lora_init import Calibration, LoraModel

ADAPTERS = golden.read_json("adapters")
CHECKPOINTS = golden.read_json("checkpoints")
CALIBRATIONS = golden.read_json("calibrations")


@functools.cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    return golden.read(name)


def assert_logits(model: LoraModel, name: str, expected: torch.Tensor) -> None:
    found = model.eval()(golden.inputs(name)).detach()
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_saved_adapter_loads(name):
    base = golden.network(ADAPTERS[name]["network"])
    model = LoraModel.from_pretrained(base, golden.DATA / "adapters" / name)
    assert_logits(model, ADAPTERS[name]["network"], tensors("adapter_logits")[name])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_state_dict_loads(name):
    case = CHECKPOINTS[name]
    replaced = name.startswith("quantized")
    if replaced and not golden.computes_as_the_writer():
        pytest.skip("a replaced base needs the writer's initial factors to the last bit")
    state = golden.read("checkpoints", name)
    model = golden.start(case, seed=0 if replaced else 1)
    model.load_state_dict(state)
    assert_logits(model, case["network"], tensors("checkpoints")[f"logits/{name}.logits"])
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_saved_calibration_serves_a_start(name):
    case = CALIBRATIONS[name]
    found = Calibration.load(golden.DATA / "calibrations" / f"{case['file']}.safetensors")
    assert (found.batches, found.tokens) == (3, 0)
    factors = golden.factors(golden.start(case, data=found))
    expected = golden.read("calibration_factors", name)
    assert factors.keys() == expected.keys()
    for key, value in expected.items():
        golden.assert_close(factors[key], value, key)
