"""The second weights that the tests give to methods that read them, as no run supplies them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import lora_init.api
import lora_init.peft_models.initialize
from lora_init.adapters.second_adapter import second_weights
from lora_init.layer import layer_generator
from lora_init.linalg.draws import normal
from lora_init.weights.second import SecondWeights


def nearby(weight, name):
    """The weight plus a smaller matrix with a decaying spectrum, drawn by the layer's name.

    The numbers do not depend on torch's default dtype and device.
    """
    generator, rows, columns = layer_generator(0, name), *weight.shape
    decay = torch.arange(1, columns + 1, device="cpu", dtype=torch.float32) ** -0.7
    mix = normal(columns, columns, generator=generator) * decay[:, None]
    return weight.float() + 0.1 / columns * normal(rows, columns, generator=generator) @ mix


class NearbyWeights(SecondWeights):
    """`nearby` for each target."""

    def check(self, weights, targets):
        pass

    def weight(self, weights, target):
        return nearby(weights.weight(target).cpu(), target.name)


@contextmanager
def nearby_by_default():
    """Where a call passes no second weights, a method that reads them gets `NearbyWeights`."""

    def supplied(model, source, spec):
        if source is None and "target_weight" in spec.reads:
            return NearbyWeights()
        return second_weights(model, source, spec)

    with pytest.MonkeyPatch.context() as patch:
        for module in (lora_init.api, lora_init.peft_models.initialize):
            patch.setattr(module, "second_weights", supplied)
        yield
