"""Small modules of experts in every layout that transformers has."""

from importlib import import_module
from types import SimpleNamespace

import torch
from torch import nn

EXPERTS, HIDDEN, WIDTH = 5, 24, 16


def found(model, name):
    """A class of a model's modeling file; None where this version of transformers has no such."""
    try:
        return getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name)
    except (ImportError, AttributeError):
        return None


KNOWN = {
    "concatenated": found("mixtral", "MixtralExperts"),
    "interleaved, transposed, biased": found("gpt_oss", "GptOssExperts"),
    "no gate": found("nemotron_h", "NemotronHExperts"),
    "norm after": found("muse_spark", "MuseSparkExperts"),
    "undeclared": found("step3p7", "Step3p7Experts"),
    "all tokens": found("llama4", "Llama4TextExperts"),
}
CLASSES = {layout: cls for layout, cls in KNOWN.items() if cls is not None}
"""A class by layout."""

ROUTERS = {
    "plain": found("mixtral", "MixtralTopKRouter"),
    "biased": found("gpt_oss", "GptOssTopKRouter"),
}
"""Classes of routers that store their weight as a parameter."""

ROUTED = [layout for layout in CLASSES if layout != "all tokens"]

CONFIG = {
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "hidden_size": HIDDEN,
    "moe_hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "moe_latent_size": None,
    "hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "post_norm_eps": 1e-6,
    "mlp_bias": False,
}


def experts(layout, implementation="eager", dtype=torch.float32):
    """A module of experts with random frozen weights."""
    config = SimpleNamespace(**CONFIG, _experts_implementation=implementation)
    module = CLASSES[layout](config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
        if name.endswith("norm.weight"):
            parameter.data += 1
    return module.to(dtype).requires_grad_(False)


def router(kind="plain", dtype=torch.float32):
    """A router with random frozen weights."""
    module = ROUTERS[kind](SimpleNamespace(**CONFIG))
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return module.to(dtype).requires_grad_(False)


class OwnExperts(nn.Module):
    """Stacks of experts in a layout that is not declared."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))

    def forward(self, x):
        return x
