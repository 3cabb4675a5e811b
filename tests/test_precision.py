"""Autocast around an initialization, a merge or a way back changes no number of ours."""

import copy

import pytest
import torch
from networks import Case
from uniform import uniform

from lora_init import LoraConfig, calibrate, concurrency, get_peft_model, list_initializers

METHODS = [spec.name for spec in list_initializers()]
CASE = Case()


def config_of(method):
    settings = uniform(method)
    return LoraConfig(
        r=4, target_modules=list(CASE.shapes), init_lora_weights={"name": method, **settings}
    )


def state_of(model):
    return {name: value.clone() for name, value in model.base_model.state_dict().items()}


def life(method, base, found):
    """Every number that an adapter makes: at the start, merged, unmerged, taken off."""
    model = get_peft_model(
        copy.deepcopy(base), config_of(method), calibration=found, keep_original=True, cache=False
    )
    stations = [state_of(model)]
    model.merge_adapter()
    stations.append(state_of(model))
    model.unmerge_adapter()
    stations.append(state_of(model))
    stations.append(model.unload().state_dict())
    return stations


@pytest.mark.parametrize("alone", [False, True], ids=["small layers", "large layers"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing(method, alone, monkeypatch):
    """Of layers that have a core each, and of those that all cores work on."""
    monkeypatch.setattr(concurrency, "ALONE", 0 if alone else concurrency.ALONE)
    base, spec = CASE.build(), next(s for s in list_initializers() if s.name == method)
    found = None
    if spec.calibration:
        found = calibrate(base, [config_of(method)], CASE.calibration())
    plain = life(method, base, found)
    with torch.autocast("cpu", torch.bfloat16):
        cast = life(method, base, found)
    for station, expected in zip(cast, plain, strict=True):
        for name, value in expected.items():
            assert torch.equal(station[name], value), name


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_statistics_are_summed_in_their_own_precision(method):
    """The model's own pass may round its activations; what is made of them is not rounded again."""
    base = CASE.build()
    name = next(iter(CASE.shapes))  # its inputs are the batches themselves
    plain = calibrate(base, [config_of(method)], CASE.calibration())
    with torch.autocast("cpu", torch.bfloat16):
        cast = calibrate(base, [config_of(method)], CASE.calibration())
    one, other = plain.layers[name], cast.layers[name]
    if method == "eva":
        assert torch.equal(other.inputs.second_moment, one.inputs.second_moment)
    else:  # through a backward pass in 16 bits
        torch.testing.assert_close(other.gradient, one.gradient, rtol=0.1, atol=1e-3)
