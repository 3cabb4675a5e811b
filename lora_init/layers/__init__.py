"""The modules that a model with an adapter runs: adapted layers and modules trained whole.

They never edit a base weight; `lora_init.injection` does.
"""

from __future__ import annotations

from torch import nn

from lora_init.layers.base import BaseState, LoraLayer
from lora_init.layers.convolution import ConvolutionLayer
from lora_init.layers.embedding import EmbeddingLayer
from lora_init.layers.experts import ExpertsLayer, LoraExperts
from lora_init.layers.linear import LinearLayer
from lora_init.layers.router import RouterLayer
from lora_init.layers.saved_module import TrainedModule, trainable_copy
from lora_init.weights.kinds import known_format

__all__ = [
    "BaseState",
    "ExpertsLayer",
    "LoraExperts",
    "LoraLayer",
    "TrainedModule",
    "layer_class",
    "trainable_copy",
]

_CLASSES = {
    "product": LinearLayer,
    "convolution": ConvolutionLayer,
    "lookup": EmbeddingLayer,
    "routed": ExpertsLayer,
    "selection": RouterLayer,
}


def layer_class(module: nn.Module) -> type[LoraLayer]:
    """The adapted layer class for a module."""
    return _CLASSES[known_format(module).operation]
