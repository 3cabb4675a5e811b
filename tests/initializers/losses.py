"""A loss over a `Chain`, and its gradients by autograd in float64."""

from __future__ import annotations

import copy

from networks import SHAPES
from transformers.pytorch_utils import Conv1D


def mean_square(model, batch):
    return model(batch).float().square().mean()


def mean_gradients(base, batches):
    """Of every layer, (out, in): the mean over the batches, of a copy in float64."""
    twin = copy.deepcopy(base).double()
    (sum(twin(batch.double()).square().mean() for batch in batches) / len(batches)).backward()
    layers = {name: twin.get_submodule(name) for name in SHAPES}
    return {
        name: layer.weight.grad.T if isinstance(layer, Conv1D) else layer.weight.grad
        for name, layer in layers.items()
    }
